"""Distillation in a training loop of your own: the engine of kd_plugins without any zoo.

    python examples/plain_torch.py

A large network that was trained on handwritten digits teaches a small one: logits, and through a trained adapter
features. What a framework's host does for its users (hook, callback) is the dozen lines marked with (KD) here.

It shows the loop, not a gain: the weights below are not tuned, and on so small a task, trained for so short a time, the
distilled student was worse than the plain one where we looked (15 epochs, 3 seeds: 20, 11 and 22 % against 39, 30 and
49 %). Measure yours.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kd_plugins.distiller import Host, Position, Session, build_terms
from kd_plugins.predictions import ClassLogits
from kd_plugins.teachers import FrozenTeacher


class Net(nn.Module):
    """A small CNN; `ClassLogits` is where its logits pass, so that they are recognised as classes."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(2 * width, classes)
        self.logits = ClassLogits(classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.classifier(self.features(images).mean((2, 3))))


class Loop(Host):
    """This loop as the engine sees it. (KD)"""

    def targets(self, inputs: Tensor, samples: Tensor | None) -> Tensor:
        return inputs.new_zeros(len(inputs), dtype=torch.long) if samples is None else samples


#: What is taught, in the same words as in a config of MMEngine or a kd.yaml of Ultralytics. (KD)
TERMS = dict(
    logits=dict(loss=dict(type='KLDivLoss', temperature=4.0), student='logits', teacher='logits'),
    features=dict(loss=dict(type='CosineFeatureLoss'), student='features', teacher='features', weight=0.5),
)


def teach(student: Net, teacher: Net, example: Tensor, optimizer: torch.optim.Optimizer) -> Session:
    """Open a session: everything that does not fit is refused here. (KD)"""
    frozen = FrozenTeacher(teacher, lambda net, images, *_: net(images), lambda images, _: images, name='large')
    session = Session(student, frozen, build_terms(TERMS), Loop())
    session.check(example)
    session.attach(optimizer)
    return session


def train(net: Net, data: tuple[Tensor, Tensor], epochs: int, teacher: Net | None = None, seed: int = 0) -> None:
    """An ordinary training loop; with a teacher, a distilled one."""
    images, labels = data
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    session = None if teacher is None else teach(net, teacher, images[:2], optimizer)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // 64)
    net.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        batch, target = images[chosen], labels[chosen]
        if session is None:
            loss = cross_entropy(net(batch), target)
        else:
            session.begin_iteration(Position(step, steps, step))  # (KD)
            with session.capture() as capture:  # (KD)
                logits = net(batch)
            kd = session.losses(capture, batch, target)  # (KD)
            loss = cross_entropy(logits, target) + torch.stack([*kd.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # steps the adapters too
    if session is not None:
        session.detach()  # (KD)


@torch.no_grad()
def accuracy(net: Net, data: tuple[Tensor, Tensor]) -> float:
    """Share of correct predictions."""
    return (net.eval()(data[0]).argmax(1) == data[1]).float().mean().item()


def digits(labelled: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The 1,797 scans of scikit-learn: some to train on, 600 to test on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    targets = torch.tensor(labels)[order]
    return (pixels[600 : 600 + labelled], targets[600 : 600 + labelled]), (pixels[:600], targets[:600])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    training, test = digits(labelled=1197)
    torch.manual_seed(0)
    teacher = Net(32)
    train(teacher, training, args.epochs)
    print(f'teacher                {accuracy(teacher, test):.1%}')
    for seed in range(args.seeds):
        found = []
        for taught_by in (None, teacher):
            torch.manual_seed(seed)
            student = Net(4)
            train(student, training, args.epochs, taught_by, seed)
            found.append(accuracy(student, test))
        print(f'seed {seed}: plain student  {found[0]:.1%}   distilled {found[1]:.1%}   {found[1] - found[0]:+.1%}')


if __name__ == '__main__':
    main()
