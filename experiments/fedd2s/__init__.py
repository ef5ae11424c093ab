"""The comparison of FedD2S with its peers: sweeps, results, tables and figures."""
