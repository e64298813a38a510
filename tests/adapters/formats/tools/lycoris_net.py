"""Run with LyCORIS: trains a LoCon of LyCORIS over linears and convolutions.

NET FILE X Y [tucker]: NET becomes the weights of a Net, FILE the LoCon, Y what both compute of X.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Net(nn.Module):
    """x [B, 3, 8, 8] -> [B, 5]; names with underscores of their own."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.Conv2d(6, 8, 3, stride=2, padding=1)])
        self.proj_out = nn.Linear(8, 5)

    def forward(self, x):
        for conv in (self.conv_in, *self.down_blocks):
            x = torch.tanh(conv(x))
        return self.proj_out(x.mean((2, 3)))


def main(net, file, x, y, *tucker):
    from lycoris import create_lycoris

    torch.manual_seed(0)
    model = Net()
    save_file(model.state_dict(), net)
    options = {"linear_dim": 4, "linear_alpha": 6.0, "conv_dim": 4, "conv_alpha": 2.0}
    network = create_lycoris(model, 1.0, algo="locon", use_tucker=bool(tucker), **options)
    network.apply_to()
    inputs = load_file(x)["x"]
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(5):
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.save_weights(file, None, None)
    with torch.no_grad():
        save_file({"y": model(inputs)}, y)


if __name__ == "__main__":
    main(*sys.argv[1:])
