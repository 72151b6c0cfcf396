"""The configuration: schema, validation and loading."""
