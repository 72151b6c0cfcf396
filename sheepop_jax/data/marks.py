"""The bits of a mark, which every token of a conversation has: a byte beside the token."""

COUNTED = 1  # the loss counts the token as a target
BEGINS = 2  # it is the first of its conversation
