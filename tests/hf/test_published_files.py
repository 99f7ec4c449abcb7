"""Files as DeepSeek publishes them: weights in float8 with factors, and modules that predict further tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.hf.checkpoints import save_random
from tests.hf.test_export import FIRST, model_tables
from titan_lite.config.errors import ConfigError
from titan_lite.hf.export import export
from titan_lite.hf.fill import opened
from titan_lite.hf.importer import import_folder
from titan_lite.pretrained import load_pretrained

BLOCK = (48, 32)
"""Neither divides all sizes of the model."""
SCALE = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}


def in_blocks(matrix: Tensor) -> Tensor:
    """(rows, columns) -> (blocks down, blocks across, height, width), with zeros where the matrix ends."""
    rows, columns = (-(-size // length) * length for size, length in zip(matrix.shape, BLOCK, strict=True))
    padded = F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
    return padded.unflatten(1, (-1, BLOCK[1])).unflatten(0, (-1, BLOCK[0])).transpose(1, 2)


def narrowed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix in float8, the factors of its blocks, and the product of both; written block by block."""
    blocks = in_blocks(matrix.float())
    factors = blocks.abs().amax(dim=(-1, -2)) / torch.finfo(torch.float8_e4m3fn).max
    narrow = (blocks / factors[:, :, None, None]).to(torch.float8_e4m3fn)
    product = narrow.float() * factors[:, :, None, None]

    def whole(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)[: matrix.shape[0], : matrix.shape[1]].contiguous()

    return whole(narrow.view(torch.uint8)).view(torch.float8_e4m3fn), factors, whole(product)


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder of a DeepSeek-V3 with float8 matrices and a module for further tokens; what its matrices are."""
    preset, flavor, changes = FIRST["deepseek_v3"]
    changes = changes | {"mtp": {"type": "modules", "reads": "normed"}}
    save_random(tmp_path / "run", model_tables(preset, flavor, **changes), torch.bfloat16)
    folder = tmp_path / "hf"
    export(tmp_path / "run", folder, verified=False)
    file = folder / "model.safetensors"
    tensors, wanted = load_file(file), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"], product = narrowed(tensors[name])
        wanted[name] = product.bfloat16()
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SCALE}))
    return folder, wanted


def test_float8_times_factors(published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, wanted = published
    import_folder(folder, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert len(wanted) > 20
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.self_attn.o_proj.weight"} <= wanted.keys()
    for name, matrix in wanted.items():
        assert torch.equal(found[name], matrix), name
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_pieces_of_a_matrix_have_their_own_factors(published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    from titan_lite.hf.fp8 import stored_weights

    folder, wanted = published
    source = stored_weights(folder, BLOCK)
    for name, matrix in wanted.items():
        for start, stop in ((0, 1), (7, 60), (23, 49)):
            assert torch.equal(source.read(name, start, min(stop, len(matrix))), matrix[start:stop])


@pytest.mark.parametrize("kind", ["gone", "of another shape"])
def test_factors_have_to_fit(kind: str, published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, wanted = published
    file, name = folder / "model.safetensors", sorted(wanted)[0]
    tensors = load_file(file)
    factors = tensors.pop(f"{name}_scale_inv")
    if kind != "gone":
        tensors[f"{name}_scale_inv"] = factors[:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    why = {"gone": "is in float8, and there is no", "of another shape": "_scale_inv has the shape"}[kind]
    with pytest.raises(ConfigError, match=rf"model.safetensors\n.*{name}.*{why}"):
        import_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_expects_float8(published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = published
    model = load_pretrained(tmp_path / "run", torch.device("cpu")).job.model
    assert opened(folder, model, quantized=True).meta.keys() == opened(folder, model).meta.keys()
    export(tmp_path / "run", tmp_path / "plain", verified=False)
    with pytest.raises(ConfigError, match=r"initial_load_in_hf_quantized = true\n.*are not quantized"):
        opened(tmp_path / "plain", model, quantized=True)
