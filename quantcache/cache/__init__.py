"""The store: entry files, their index, and what looks after them. Stores bytes; knows no codec and no model."""
