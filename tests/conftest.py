"""What all tests share: two threads at most, so that their numbers and times do not depend on the machine."""

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
