"""Evidence on privacy: accuracy against epsilon, claims against audits, what leaks by which channel."""
