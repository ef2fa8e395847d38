"""When the house-keeping happens."""
