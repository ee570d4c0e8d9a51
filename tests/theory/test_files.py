"""Files appear whole or not at all."""

import pytest

from theory.files import write_whole


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    """Neither half a file nor a temporary one, and everybody may read what is written."""
    path = tmp_path / "a.md"
    write_whole(path, lambda file: file.write(b"old"))
    assert path.stat().st_mode & 0o777 == 0o644

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_no_folder(tmp_path):
    with pytest.raises(OSError, match="none"):
        write_whole(tmp_path / "none" / "a.md", lambda file: file.write(b""))
