"""The clients' side: building one client's tensors, the engines that run them, and the Flower ClientApp."""
