"""The front door: what leaves a client is bounded, noised and booked here; audits look in from outside."""
