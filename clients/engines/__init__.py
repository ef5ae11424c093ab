"""Engines: what runs a client app behind a local Grid."""
