"""`llmfast verify --require-signature`: who signed a bundle, by the package model-signing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmfast.cli import app
from llmfast.verify import SIGNATURE
from tests import tiny_decoder

signing = pytest.importorskip("model_signing.signing", reason="needs llmfast[signing]")


def _make_keys(folder: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    folder.mkdir()
    private, public = folder / "private.pem", folder / "public.pem"
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def _verify(bundle: Path, key: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", str(bundle), "--require-signature", str(key)])
    return result.exit_code, result.stderr


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """Return a signed bundle and the public key."""
    private, public = _make_keys(tmp_path / "keys")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    tiny_decoder.write_bundle(bundle)
    config = signing.Config().use_elliptic_key_signer(private_key=private)
    config.sign(bundle, bundle / SIGNATURE)
    return bundle, public


def test_a_signed_bundle_is_taken_with_its_signature_in_it(signed: tuple[Path, Path]) -> None:
    assert _verify(*signed) == (0, "")
    arguments = ["infer", str(signed[0]), "-p", "x", "--max-tokens", "1", "--verify"]
    assert CliRunner().invoke(app, arguments).exit_code == 0


def _change(bundle: Path) -> None:
    with (bundle / "tokenizer_config.json").open("a") as file:
        file.write("\n")


def _add(bundle: Path) -> None:
    (bundle / "new.py").write_text("x = 1")


def _spoil(bundle: Path) -> None:
    (bundle / SIGNATURE).write_text("{}")


@pytest.mark.parametrize("damage", [_change, _add, _spoil])
def test_a_bundle_that_was_changed_since_is_refused(damage: Callable[[Path], None], signed: tuple[Path, Path]) -> None:
    damage(signed[0])
    code, errors = _verify(*signed)
    assert code == 4
    assert "the signature of" in errors
    assert "does not hold" in errors


def test_a_bundle_that_somebody_else_signed_is_refused(signed: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = _make_keys(tmp_path / "other")
    assert _verify(signed[0], other)[0] == 4


def test_a_key_that_cannot_be_read_is_told(signed: tuple[Path, Path]) -> None:
    code, errors = _verify(signed[0], signed[0] / "nowhere.pem")
    assert (code, "cannot read" in errors) == (3, True)


def test_a_signature_of_another_bundle_is_refused(signed: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, key = signed
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    _change(other)
    shutil.copy(bundle / SIGNATURE, other / SIGNATURE)
    assert _verify(other, key)[0] == 4
