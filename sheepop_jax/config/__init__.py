"""The configuration: its schema, its validation and its loading."""
