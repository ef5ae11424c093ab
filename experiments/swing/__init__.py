"""Evidence on Swing distillation: exposure of secrets in text against perplexity."""
