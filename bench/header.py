"""One step of a header at C = 85,742 classes: loss, features' gradient, and the centres moved."""

import torch

from bench.plain import PlainAdaDistill, PlainArcFace
from bench.processes import return_memory
from utils.losses import build_header

B, C, D = 128, 85_742, 512


class Step:
    """What both ways have in common: the same features, labels and centres."""

    def __init__(self, method: str, device: str):
        self.adaptive = method == "AdaDistill"
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(B, D, generator=generator).to(device)
        self.teacher = self.features + 0.5 * torch.randn(B, D, generator=generator).to(device)
        self.labels = torch.randperm(C, generator=generator)[:B].to(device)
        self.kernel = 0.01 * torch.randn(D, C, generator=generator)
        # libraries start before anything is measured
        self.build(1000)
        self.step(self.labels % 1000)
        self.build(C)
        return_memory()

    def step(self, labels=None) -> dict:
        labels = self.labels if labels is None else labels
        features = self.features.clone().requires_grad_()
        teacher = [self.teacher] if self.adaptive else []
        loss = self.loss(features, labels, *teacher)
        loss.backward()
        self.move()
        return dict(loss=loss.item(), gradient=features.grad.norm().item())


class Plain(Step):
    def build(self, num_classes: int) -> None:
        header = PlainAdaDistill if self.adaptive else PlainArcFace
        self.header = header(D, num_classes).to(self.device)
        self.header.kernel.data.copy_(self.kernel[:, :num_classes])
        self.loss = self.header
        self.optimizer = torch.optim.SGD(
            self.header.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4
        )

    def move(self) -> None:
        if not self.adaptive:
            self.optimizer.step()
        self.header.zero_grad()


class Ours(Step):
    def build(self, num_classes: int) -> None:
        method = "AdaDistill" if self.adaptive else "standalone"
        self.header = build_header(method, "ArcFace", D, num_classes).to(self.device)
        self.header.load_kernel(self.kernel[:, :num_classes])
        self.header.centers.defer = True

    def move(self) -> None:
        if not self.adaptive:
            self.header.centers.step(1e-3, 0.9, 5e-4)

    def loss(self, *inputs):
        return self.header(*inputs)[0]

    def limit(self) -> dict:
        """The two matrix products and one softmax that no way can do without."""
        logits = self.header.centers.matrix.take(B, C, self.device)
        weight = self.header.centers.weight.detach()
        torch.mm(self.features, weight.t(), out=logits)
        gradient = torch.softmax(logits, 1) @ weight
        self.header.centers.matrix.give_back(logits)
        return dict(size=gradient.shape[1])
