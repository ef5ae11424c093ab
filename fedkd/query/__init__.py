"""Which questions to put to a teacher that answers only so many of them."""
