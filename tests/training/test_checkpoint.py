"""A checkpoint brings everything back, is deterministic, and is never half there."""

import pytest
import torch
from torch.nn import functional

from model.contract import InterflowError
from model.registry import create_model
from training import checkpoint as checkpoint_module
from training.checkpoint import Progress, load_checkpoint, load_network, save_checkpoint

PROGRESS = Progress(epoch=3, step=17, data="abc")


def trained(steps=3, seed=0, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(seed)
    network = create_model("vgg16", width=0.05)
    opt = optimizer(network.parameters(), lr=0.01, **options)
    _steps(network, opt, steps)
    return network, opt


def _steps(network, opt, steps):
    for _ in range(steps):
        opt.zero_grad()
        functional.cross_entropy(network(torch.randn(8, 3, 32, 32)).logits, torch.arange(8)).backward()
        opt.step()


@pytest.mark.parametrize(
    "optimizer", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {}), (torch.optim.AdamW, {})]
)
def test_going_on_from_a_checkpoint_is_going_on(tmp_path, optimizer):
    kind, options = optimizer
    network, opt = trained(optimizer=kind, **options)
    save_checkpoint(tmp_path / "c.safetensors", network, opt, {"totals": torch.tensor([1.5, 2])}, PROGRESS)
    _steps(network, opt, 2)

    resumed, resumed_opt = trained(steps=0, seed=9, optimizer=kind, **options)
    state = {"totals": torch.zeros(2)}
    progress = load_checkpoint(tmp_path / "c.safetensors", resumed, resumed_opt, state)
    assert progress == PROGRESS
    assert state["totals"].tolist() == [1.5, 2]
    _steps(resumed, resumed_opt, 2)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_same_state_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        network, opt = trained(momentum=0.9)
        save_checkpoint(tmp_path / f"{name}.safetensors", network, opt, {}, PROGRESS)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    network, opt = trained()
    save_checkpoint(path, network, opt, {}, PROGRESS)
    before = path.read_bytes()

    def full_disk(_tensors, temporary, **_options):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    with pytest.raises(InterflowError, match=r"No space left on device.*What was saved before is kept"):
        save_checkpoint(path, network, opt, {}, PROGRESS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_foreign_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    network, opt = trained()
    save_checkpoint(path, network, opt, {}, PROGRESS)
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-10], b"\xff" * 200):
        path.write_bytes(content)
        with pytest.raises(InterflowError, match="not a checkpoint"):
            load_network(path, network)
    with pytest.raises(InterflowError, match="not a checkpoint"):
        load_network(tmp_path / "none.safetensors", network)
    path.write_bytes(whole)
    with pytest.raises(InterflowError, match="another network"):
        load_network(path, create_model("vgg16", width=0.1))
