import os
import shutil
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.schema.corpus import SourceConfig, SplitConfig
from pipelines.corpus.sources import hash_fraction, is_validation, list_source


def test_the_same_data_elsewhere_has_the_same_digest(source_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source_folder, tmp_path / "elsewhere")
    here, there = (list_source(SourceConfig(path=str(p))) for p in (source_folder, copy))
    assert here.digest == there.digest
    assert [f.name for f in here.files] == sorted(f.name for f in here.files)

    (copy / "special.py").write_text("changed")
    assert list_source(SourceConfig(path=str(copy))).digest != here.digest


def test_the_standard_library_is_found_without_site_packages() -> None:
    names = [f.name for f in list_source(SourceConfig(path="python:stdlib", include=("[a-j]*.py",))).files]
    assert "json/decoder.py" in names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)


def test_patterns_choose_files_at_any_depth(tmp_path: Path) -> None:
    for name in ("a.txt", "b.py", "x/c.txt", "x/y/d.txt", "z/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    config = SourceConfig(path=str(tmp_path), include=("*.txt",), exclude=("x/y/*", "z/*"))
    assert [f.name for f in list_source(config).files] == ["a.txt", "x/c.txt"]


def test_a_single_file_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("text")
    assert [f.name for f in list_source(SourceConfig(path=str(tmp_path / "one.txt"), include=("*.txt",))).files] == [
        "one.txt"
    ]


@pytest.mark.parametrize("path", ["/does/not/exist", "."])
def test_no_data_is_an_error_that_names_the_key(path: str) -> None:
    with pytest.raises(DataError, match="source") as error:
        list_source(SourceConfig(path=path, include=("*.nothing-ends-so",)))
    assert error.value.next_step


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_listed_as_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "b.py").write_text("b")
    (tmp_path / "b.py").chmod(0)
    listing = list_source(SourceConfig(path=str(tmp_path)))
    assert [r.name for r in listing.unreadable] == ["b.py"]


def test_a_file_that_changes_after_it_was_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("before")
    listing = list_source(SourceConfig(path=str(tmp_path)))
    (tmp_path / "a.py").write_text("after")
    with pytest.raises(DataError, match=r"a\.py changed"):
        listing.read(listing.files[0])


def test_the_split_follows_content_and_salt_alone(source_folder: Path, tmp_path: Path) -> None:
    listing = list_source(SourceConfig(path=str(source_folder)))
    split = SplitConfig(validation_fraction=0.3)
    held_out = {f.blake3 for f in listing.files if is_validation(f.blake3, split)}
    assert 0 < len(held_out) < len(listing.files)

    shutil.copy(source_folder / "special.py", tmp_path / "renamed.py")
    renamed = list_source(SourceConfig(path=str(tmp_path))).files[0]
    assert is_validation(renamed.blake3, split) == (renamed.blake3 in held_out)
    other = SplitConfig(validation_fraction=0.3, salt="another")
    assert held_out != {f.blake3 for f in listing.files if is_validation(f.blake3, other)}


def test_fractions_are_spread_evenly() -> None:
    values = [hash_fraction("salt", str(n)) for n in range(4000)]
    assert all(0 <= v < 1 for v in values)
    assert abs(sum(v < 0.25 for v in values) / 4000 - 0.25) < 0.03
