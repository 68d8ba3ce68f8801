"""The table of networks: all of them, with what the code says now."""

from pathlib import Path

import pytest
import torch

from model.catalogue import BACKBONES
from model.registry import create_model
from training import networks

PAGE = (Path(__file__).parents[2] / networks.TABLE).read_text(encoding="utf-8")


def test_the_page_has_every_network_in_order_and_the_text_of_today():
    assert PAGE.startswith(networks.HEADER)
    names = [line.split("`")[1] for line in PAGE.removeprefix(networks.HEADER).splitlines()]
    assert names == list(BACKBONES)


@pytest.mark.parametrize("name", ["vgg16", "plain40", "afi_resnet32", "aff_resnext38_32x4d", "mrla_light_resnet50"])
def test_a_row_is_what_the_network_is(name):
    assert networks._row(name) in PAGE.splitlines()


@pytest.mark.parametrize(("name", "expected"), [("resnet32", 69_130_496), ("resnet50", 4_089_184_256)])
def test_multiply_adds_are_the_published_ones(name, expected):
    entry = BACKBONES[name]
    with torch.device("meta"):
        network = create_model(name, method="normal", num_classes=entry.classes).eval()
    assert networks.multiply_adds(network, entry.image_size) == expected


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "BACKBONES", {"vgg16": BACKBONES["vgg16"]})
    networks.main(["--out", str(tmp_path / "deep" / "networks.md")])
    assert "| `vgg16` | 32 | 10 | 14,724,042 | 313.2 M |" in (tmp_path / "deep" / "networks.md").read_text()
    assert "1 networks ->" in capsys.readouterr().out
