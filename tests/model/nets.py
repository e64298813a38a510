"""A model with a module of every kind, and what is asked of it."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.layers.base import LoRALayer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.value = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(8)


class Net(nn.Module):
    """One module of every kind that can be wrapped, and some that cannot."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.mix = Conv1D(6, 8)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 2), padding=1)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.head = nn.Linear(6, 3)


def layers_of(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALayer)}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}
