import json
import pickle
import runpy
import shutil
import struct
import sys
import zipfile

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, refused, run_main

import data
from data import layer_in_name, load_vector, save_vector

SUFFIXES = ("safetensors", "gguf", "pt")
METADATA = {"base_model": "tiny", "model_type": "mistral", "system": "é\n", "epoch": "20"}


def test_vector_file_round_trip(tmp_path):
    v = torch.randn(8)
    metadata = {"system": "é\n", "base_model": None}  # what is None is left out
    save_vector(tmp_path / "vector.safetensors", {3: v.requires_grad_()}, metadata)
    for path in (tmp_path, tmp_path / "vector.safetensors"):
        vectors, metadata = load_vector(path)
        assert list(vectors) == [3] and torch.equal(vectors[3], v)
        assert metadata == {"system": "é\n"}
    assert [file.name for file in tmp_path.iterdir()] == ["vector.safetensors"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_others_may_read_a_vector_as_any_new_file(tmp_path, suffix):
    file = tmp_path / f"layer3.{suffix}"
    (tmp_path / "new").touch()
    save_vector(file, {3: torch.ones(8)}, {})
    assert file.stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"layer3.{suffix}"
    save_vector(file, {3: torch.ones(8)}, {})
    with pytest.raises(ValueError, match="not written, .* NaN"):
        save_vector(file, {3: torch.tensor([float("nan")] * 8)}, {})

    def full(self):  # what has been written before it may not take the file's name
        raise OSError("disk full")

    monkeypatch.setattr("torch.save", lambda v, path: full(path.write_bytes(b"half")))
    monkeypatch.setattr("safetensors.torch.save_file", lambda v, path, x: full(path.touch()))
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    with pytest.raises(ValueError, match="cannot write .*disk full"):
        save_vector(file, {3: torch.zeros(8)}, {})
    assert torch.equal(load_vector(file)[0][3], torch.ones(8))


# ---- other programs' files


def test_the_gguf_package_reads_what_we_write(tmp_path):
    vectors = {15: torch.randn(33), 2: torch.randn(33)}  # no multiple of 32 bytes
    save_vector(tmp_path / "v.gguf", vectors, METADATA)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys.pop("general.architecture") == "controlvector"
    assert keys.pop("controlvector.model_hint") == "mistral"
    assert keys.pop("controlvector.layer_count") == 2
    expected = {f"bipo.{key}": text for key, text in METADATA.items()}
    assert {k: x for k, x in keys.items() if not k.startswith("GGUF.")} == expected
    assert [tensor.name for tensor in reader.tensors] == ["direction.2", "direction.15"]
    for tensor in reader.tensors:
        layer = int(tensor.name.split(".")[1])
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.data.shape == (33,)
        assert tensor.data.tolist() == vectors[layer].tolist()
    loaded, metadata = load_vector(tmp_path / "v.gguf")
    assert metadata == METADATA and all(torch.equal(loaded[i], v) for i, v in vectors.items())
    with pytest.raises(ValueError, match="llama.cpp steers no layer 0"):
        save_vector(tmp_path / "w.gguf", {0: torch.ones(8), 1: torch.ones(8)}, {})
    assert not (tmp_path / "w.gguf").exists()


def write_gguf(path, tensors, alignment=32, architecture="controlvector"):
    """With keys of other programs."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_bool("x.bool", True)
    writer.add_array("x.array", ["a", "bc"])
    writer.add_float64("x.float64", 0.5)
    for name, x in tensors.items():
        writer.add_tensor(name, np.asarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_quantized_gguf(path, v, kind=gguf.GGMLQuantizationType.Q8_0):
    writer = gguf.GGUFWriter(path, "controlvector")
    packed = gguf.quantize(v.numpy(), kind)
    writer.add_tensor("direction.1", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [32, 64])
def test_we_read_what_the_gguf_package_writes(tmp_path, alignment):
    first, second = torch.randn(33), torch.randn(33)
    tensors = {"direction.1": first, "direction.12": second}
    write_gguf(tmp_path / "v.gguf", tensors, alignment)
    vectors, metadata = load_vector(tmp_path / "v.gguf")
    assert list(vectors) == [1, 12] and metadata == {"model_type": "llama"}
    assert torch.equal(vectors[1], first) and torch.equal(vectors[12], second)
    assert list(load_vector(tmp_path / "v.gguf", 12)[0]) == [12]
    with pytest.raises(ValueError, match=r"no vector for layer 3, only \[1, 12\]"):
        load_vector(tmp_path / "v.gguf", 3)
    write_gguf(tmp_path / "v.gguf", {"direction.1": first.half()})
    assert torch.equal(load_vector(tmp_path / "v.gguf")[0][1], first.half().float())
    write_quantized_gguf(tmp_path / "v.gguf", first.repeat(32))
    assert (load_vector(tmp_path / "v.gguf")[0][1] - first.repeat(32)).abs().max() < 0.05
    for other in ("llama", "projection"):  # one that is to be projected out, say
        write_gguf(tmp_path / "v.gguf", tensors, architecture=other)
        with pytest.raises(ValueError, match="not a GGUF control vector"):
            load_vector(tmp_path / "v.gguf")


def test_gguf_files_written_by_hand_before_are_read(tmp_path):
    """The bytes that this program wrote before it used the package."""
    file = tmp_path / "v.gguf"
    shutil.copy(ROOT / "tests" / "old_vector.gguf", file)
    vectors, metadata = load_vector(file)
    assert metadata == METADATA
    assert list(vectors) == [2, 15]
    assert torch.equal(vectors[2], torch.arange(5.0)) and torch.equal(
        vectors[15], -torch.arange(5.0)
    )


def test_without_the_gguf_package(tmp_path, monkeypatch):
    save_vector(tmp_path / "v.gguf", {1: torch.ones(8)}, {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="read .*v.gguf: this needs a package, pip install gguf"):
        load_vector(tmp_path / "v.gguf")
    with pytest.raises(ValueError, match="^this needs a package, pip install gguf: "):
        save_vector(tmp_path / "w.gguf", {1: torch.ones(8)}, {})


def test_tensors_as_other_programs_save_them(tmp_path):
    v, file = torch.randn(8), tmp_path / "layer3.pt"
    for x in (v, v[None], v[None, None], torch.nn.Parameter(v), {3: v}, {3: v[None]}, v.double()):
        torch.save(x, file)
        assert torch.equal(load_vector(file)[0][3], v)
    for x in (v.half(), v.bfloat16()):
        torch.save(x, file)
        loaded = load_vector(file)[0][3]
        assert loaded.dtype == torch.float32 and torch.equal(loaded, x.float())
    torch.save({2: v, 14: -v}, tmp_path / "steering.pt")  # {layer: vector}; nothing in the name
    vectors, _ = load_vector(tmp_path / "steering.pt")
    assert list(vectors) == [2, 14] and torch.equal(vectors[14], -v)
    assert list(load_vector(tmp_path / "steering.pt", 14)[0]) == [14]


def test_the_layer_in_a_files_name(tmp_path):
    for name, layer in {
        "vec_ep20_layer15.pt": 15,  # the official code
        "vec_layer_13_Llama-2-7b-chat-hf.pt": 13,  # CAA
        "vec_ep10_layer05_gpu3.pt": 5,
        "wealth_player3.pt": None,
        "layer1_or_layer2.pt": None,
    }.items():
        assert layer_in_name(tmp_path / name) == layer
        torch.save(torch.ones(8), tmp_path / name)  # as they do
        if layer is None:
            with pytest.raises(ValueError, match=f"'{name}' is no vector .*--layer says its layer"):
                load_vector(tmp_path / name)
            with pytest.raises(ValueError, match="its name the layer: vec_layer15.pt"):
                save_vector(tmp_path / name, {3: torch.ones(8)}, {"epoch": "7"})
            assert list(load_vector(tmp_path / name, 4)[0]) == [4]
        else:
            assert list(load_vector(tmp_path / name)[0]) == [layer]
            with pytest.raises(ValueError, match=rf"no vector for layer 4, only \[{layer}\]"):
                load_vector(tmp_path / name, 4)
    for vectors in ({14: torch.ones(8)}, {15: torch.ones(8), 16: torch.ones(8)}):
        with pytest.raises(ValueError, match="a .pt file holds one vector"):
            save_vector(tmp_path / "vec_ep20_layer15.pt", vectors, {})


def test_convert_and_show(tmp_path, capsys, monkeypatch):
    v = torch.randn(100)
    ours, cpp, back = tmp_path / "v.safetensors", tmp_path / "v.gguf", tmp_path / "w.safetensors"
    official = tmp_path / "vec_ep20_layer15.pt"
    save_vector(ours, {15: v}, METADATA)
    run_main(data.main, "convert", ours, cpp)
    printed = capsys.readouterr().out
    assert f"--control-vector-scaled {cpp}:1.0 --control-vector-layer-range 15 15\n" in printed
    run_main(data.main, "convert", cpp, back)
    vectors, metadata = load_vector(back)
    assert torch.equal(vectors[15], v) and metadata == METADATA
    run_main(data.main, "convert", back, official)
    tensor = torch.load(official, weights_only=True)
    assert torch.equal(tensor, v) and tensor.dtype == torch.float32
    run_main(data.main, "convert", ours, back, "--scale", -0.5, "--overwrite")
    run_main(data.main, "convert", back, back, "--scale", 3, "--overwrite")
    vectors, metadata = load_vector(back)
    assert torch.equal(vectors[15], v * -0.5 * 3) and metadata == METADATA | {"scale": "-1.5"}
    capsys.readouterr()
    run_main(data.main, "show", ours)
    shown = capsys.readouterr().out
    assert f"layer 15, width 100, |v| {v.norm():.3f}" in shown
    assert "base_model  tiny" in shown and "epoch       20" in shown and "llama-cli" not in shown
    monkeypatch.setattr("sys.argv", ["data.py", "show", str(ours)])
    runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
    assert capsys.readouterr().out == shown
    run_main(data.main, "show", official)
    assert capsys.readouterr().out == f"layer 15, width 100, |v| {v.norm():.3f}\n"


# ---- a row for each layer


def test_a_tensor_with_a_row_for_each_layer(tmp_path, fails, capsys):
    """Its rows count as their number says: hidden_states begin with the embedding."""
    file = tmp_path / "all.pt"
    rows = torch.randn(4, 32)
    torch.save(rows, file)
    vectors, _ = load_vector(file, 2, n_layers=4)
    assert list(vectors) == [2] and torch.equal(vectors[2], rows[2])
    torch.save(torch.cat((torch.zeros(1, 32), rows)), file)
    assert torch.equal(load_vector(file, 2, n_layers=4)[0][2], rows[2])

    for n_layers, layer, part in (
        (4, None, "holds 5 rows, one a layer: --layer takes one"),
        (None, 2, "holds 5 rows, one a layer, which only a model tells: eval.py"),
        (6, 2, "holds 5 rows, one a layer, but the model has 6 layers"),
        (3, 2, "holds 5 rows, one a layer, but the model has 3 layers"),
        (4, 4, "no vector for layer 4, only [0, 1, 2, 3]"),
    ):
        refused(lambda n=n_layers, layer=layer: load_vector(file, layer, n), part)

    fails(data.main, ["show", file, "--layer", 2], "which only a model tells: eval.py and data.py")
    torch.save(torch.ones(3, 4, 32), file)  # of refusal_direction: position, layer, width
    refused(lambda: load_vector(file, 2, 4), "torch.float32 [3, 4, 32] is no vector")


# ---- alternatives


def test_of_alternatives_one_must_be_chosen(tmp_path, fails, capsys):
    """Such a file has a vector for each layer: bipo.py --layer all."""
    file = tmp_path / "all.safetensors"
    save_vector(file, {1: torch.ones(8), 2: torch.ones(8)}, {"alternatives": "choose"})
    refused(lambda: load_vector(file), "a vector for each of the layers [1, 2]: --layer takes one")
    assert list(load_vector(file, 2)[0]) == [2]
    fails(data.main, ["convert", file, tmp_path / "v.gguf"], ": --layer takes one")
    run_main(data.main, "show", file)
    shown = capsys.readouterr().out
    assert "layer 1, width 8" in shown and "layer 2, width 8" in shown
    run_main(data.main, "convert", file, tmp_path / "v.gguf", "--layer", 2)
    vectors, metadata = load_vector(tmp_path / "v.gguf")
    assert list(vectors) == [2] and "alternatives" not in metadata


# ---- sums


def test_sums(tmp_path, fails, capsys):
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    v, w = torch.randn(8), torch.randn(8)
    save_vector(a, {3: v}, METADATA | {"epoch": "1", "stream_norms": '{"3": 10.0}'})
    save_vector(b, {3: w, 4: w}, METADATA | {"epoch": "2", "stream_norms": '{"4": 20.0}'})
    run_main(data.main, "convert", f"{a}:2", f"{b}:-0.5", out)
    vectors, metadata = load_vector(out)
    assert torch.equal(vectors[3], 2 * v - 0.5 * w) and torch.equal(vectors[4], -0.5 * w)
    assert metadata.pop("sum") == f"{a}:2 {b}:-0.5" and "epoch" not in metadata
    assert data.stream_norms(metadata) == {3: 10.0, 4: 20.0}
    for key in ("base_model", "model_type", "system"):  # what all say
        assert metadata[key] == METADATA[key]
    shown = capsys.readouterr().out
    assert f"wrote {out}\n" in shown and f"({vectors[4].norm() / 20:.2%} of |h|)" in shown

    before = out.read_bytes()
    args = ["convert", a, out]
    fails(data.main, args, f"{out} is there: --overwrite replaces it")
    assert out.read_bytes() == before
    run_main(data.main, *args, "--overwrite")
    assert torch.equal(load_vector(out)[0][3], v)
    save_vector(b, {3: torch.ones(9)}, {})
    fails(data.main, ["convert", a, b, tmp_path / "new.pt"], f"{b} cannot be added")


def test_norms_of_the_stream_are_read_from_anything():
    assert data.stream_norms({"stream_norms": '{"3": 2.5, "14": 1}'}) == {3: 2.5, 14: 1.0}
    for text in ("", "[", "[1]", "3", '{"a": 1}', '{"3": null}', "[" * 5000):
        assert data.stream_norms({"stream_norms": text}) == {}
    assert data.stream_norms({}) == {}


def test_show_shortens_long_metadata(tmp_path, capsys):
    save_vector(tmp_path / "v.safetensors", {3: torch.ones(8)}, {"pairs": "abcdefgh " * 1000})
    run_main(data.main, "show", tmp_path / "v.safetensors")
    shown = capsys.readouterr().out
    assert "  pairs       abcdefgh " in shown and " ... 9000 characters" in shown
    assert max(map(len, shown.splitlines())) < 300


# ---- files that are refused


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("v.svec", 'json.load(open(FILE))["directions"]["LAYER"] of .svec'),
        ("v.json", "json.load(open(FILE)) of .json"),
        ("v.npy", "numpy.load(FILE) of .npy"),
        ("v.npz", 'numpy.load(FILE)["NAME"] of .npz'),
        ("v.bin", "torch.load(FILE) of .bin"),
        ("vector", "such files are not read"),
    ],
)
def test_files_of_other_programs_are_named_with_how_to_convert_them(tmp_path, fails, name, advice):
    (tmp_path / name).write_text("{}")
    convert = "torch.save({LAYER: torch.tensor(NUMBERS)}"
    fails(
        data.main, ["show", tmp_path / name], "cannot read", "files are not read", convert, advice
    )


def test_files_that_claim_much_are_refused_at_once(tmp_path, fails):
    huge = torch.ones(1).expand(2**40)  # no memory: each number is the same one
    torch.save(huge, tmp_path / "stride_layer3.pt")
    torch.save({3: torch.zeros(2**20)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain:
        name = next(x.filename for x in plain.infolist() if x.filename.endswith("data/0"))
        with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in plain.infolist():
                content = plain.read(entry)
                packed.writestr(entry.filename, content if entry.filename != name else bytes(2**31))
    array = b"general.x", struct.pack("<IIQ", 9, 4, 2**40)
    key = struct.pack("<Q", len(array[0])) + array[0] + array[1]
    (tmp_path / "array.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key)
    tensor = struct.pack("<Q11sIQIQ", 11, b"direction.1", 1, 2**40, 0, 0)
    (tmp_path / "wide.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + tensor)
    safetensors.torch.save_file({"direction.3": torch.ones(10**7 + 1)}, tmp_path / "v.safetensors")
    for name, reason in (
        ("stride_layer3.pt", "a width of 1099511627776 is no model's"),
        ("packed.pt", "unpacked it would take 204"),
        ("array.gguf", "it claims more than it holds"),
        ("wide.gguf", "cannot read"),
        ("v.safetensors", "a width of 10000001 is no model's"),
    ):
        fails(data.main, ["show", tmp_path / name], name, reason)


class Bomb:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.filterwarnings("error")
def test_code_in_a_pickle_is_not_run(tmp_path, fails):
    trap, bomb = tmp_path / "trap", Bomb(tmp_path / "trap")
    pickle.loads(pickle.dumps(bomb)).close()
    trap.unlink()  # so it does go off
    torch.save(bomb, tmp_path / "layer3.pt")
    torch.save({"direction.3": torch.ones(8), "x": bomb}, tmp_path / "dict_layer3.pt")
    for name in ("legacy_layer3.pt", "layer3.gguf", "layer3.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(bomb))
    for file in sorted(tmp_path.glob("*layer3.*")):
        reason = "Weights only load failed" if file.suffix == ".pt" else ""
        fails(data.main, ["convert", file, tmp_path / "v.gguf"], "cannot read", file.name, reason)
        assert not trap.exists() and not (tmp_path / "v.gguf").exists(), file


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_short(tmp_path, suffix):
    file = tmp_path / f"layer3.{suffix}"
    save_vector(file, {3: torch.ones(16)}, METADATA)
    whole = file.read_bytes()
    needed = len(whole.rstrip(b"\0"))  # GGUF ends in padding
    for end in [*range(0, needed, 9), needed - 1]:
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=f"cannot read .*layer3.{suffix}"):
            load_vector(file)


NOT_VECTORS = [
    torch.tensor([1.0, float("nan")]),
    torch.tensor([1e300], dtype=torch.float64),  # infinite in fp32
    torch.tensor([1e38, 3e38]),  # its norm is
    torch.ones(2, 2),
    torch.ones(()),
    torch.ones(2, dtype=torch.int32),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_that_are_no_vectors(tmp_path, suffix):
    file = tmp_path / f"layer3.{suffix}"
    for x in NOT_VECTORS:
        if suffix == "safetensors":
            safetensors.torch.save_file({"direction.3": x}, file)
        if suffix == "gguf":
            write_gguf(file, {"direction.3": x})
        if suffix == "pt":
            torch.save(x, file)
        with pytest.raises(
            ValueError, match="] is no vector|holds NaN|holds 2 rows|not yet implemented"
        ):
            load_vector(file)


def test_other_files_that_are_refused(tmp_path):
    def refused(name, message):
        with pytest.raises(ValueError, match=message):
            load_vector(tmp_path / name)

    for name in ("layer3", "direction.-3", "direction.", "direction.3.5"):
        safetensors.torch.save_file({name: torch.ones(2)}, tmp_path / "v.safetensors")
        refused("v.safetensors", rf"'{name}' is no vector direction.LAYER: --layer says its layer")
        assert list(load_vector(tmp_path / "v.safetensors", 5)[0]) == [5]
        write_gguf(tmp_path / "v.gguf", {name: torch.ones(2)})
        refused("v.gguf", "is no vector direction.LAYER")
    values = {"a": torch.ones(2), 3: torch.ones(2)}, {3: {}}, [torch.ones(2)], "text", {3: [1.0]}
    for x in (*values, torch.ones(2).to_sparse(), torch.ones(2, device="meta")):
        torch.save(x, tmp_path / "layer3.pt")
        refused("layer3.pt", "cannot read .*layer3.pt: ")
    with pytest.raises(ValueError, match="name ends in .safetensors, .pt, .gguf"):
        save_vector(tmp_path / "layer3.npy", {3: torch.ones(2)}, {})
    (tmp_path / "v.safetensors").write_bytes(struct.pack("<Q", 2) + json.dumps({}).encode())
    refused("v.safetensors", "no vector for layer None, only ..$")
    two = {"a": torch.ones(2), "b": torch.ones(2)}
    safetensors.torch.save_file(two, tmp_path / "v.safetensors")
    refused("v.safetensors", "'a' is no vector direction.LAYER$")
    (tmp_path / "v.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 1, 0, 0))
    refused("v.gguf", "cannot read .*v.gguf: ")
    refused("none", "cannot read .*none: No such file")
    refused("", "cannot read .*vector.safetensors")
