"""The model as pure functions and Linen modules: token ids, hidden states, logits, loss."""
