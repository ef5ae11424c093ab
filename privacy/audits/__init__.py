"""Audits: what leaked all the same, with its uncertainty. They read, and touch nothing."""
