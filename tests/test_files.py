"""Files that several packages write: whole, and on disk before they have their name."""

from sheepop_jax.files import try_lock, write_atomic


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, disk_order):
    write_atomic(tmp_path / "a.json", "r\u00e9\n")
    assert disk_order == [("synced", 4), ("renamed", "a.json")]
    assert (tmp_path / "a.json").read_bytes() == "r\u00e9\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_lock_has_one_holder(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("r") as second:
        assert try_lock(first) and try_lock(first)
        assert not try_lock(second)
        first.close()
        assert try_lock(second)
