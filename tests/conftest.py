"""One torch thread for all tests: their tensors are small, and threads that wait for a busy core cost forty-fold."""

import torch

torch.set_num_threads(1)
