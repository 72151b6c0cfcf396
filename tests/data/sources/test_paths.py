"""Which files a path means, in which order, and what is skipped."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sheepop_jax.config.data import inner_suffix
from sheepop_jax.data.sources import paths
from sheepop_jax.data.sources.paths import Walk, find_files, signature_of
from sheepop_jax.errors import InputError

TEXT = Walk({".txt", ".py", ".md", ".rs"})


def write(root: Path, *names: str, **contents: str) -> Path:
    for name, content in {**{name: name for name in names}, **contents}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def ids(spec, walk=TEXT):
    return [name for name, _ in find_files("data.path", str(spec), walk).files]


def test_a_directory_is_read_in_order_without_hidden_vendored_or_foreign_files(tmp_path):
    files = ["a.txt", "a/B.TXT", "a/c.md.GZ", "a/deep/er/c.rs", "a/z.md", "b.py"]
    write(tmp_path, *reversed(files))
    write(tmp_path, ".hidden.py", "a/.git/x.py", "a/.x.txt")
    write(tmp_path, "node_modules/x.py", "a/venv/x.py", "a/deep/__pycache__/x.py")
    write(tmp_path, "my-env/pyvenv.cfg", "my-env/lib/x.py", "a/deep/e/pyvenv.cfg", "a/deep/e/x.py")
    write(tmp_path, "picture.png", "README", "a/x.png.gz", "txt")
    found = find_files("data.path", str(tmp_path), TEXT)
    assert found.files == [(name, tmp_path / name) for name in files]
    assert found.skipped == {
        "hidden or vendored directories": 6,
        "hidden or special files": 2,
        ".png files": 1,
        ".png.gz files": 1,
        "suffixless files": 2,
    }


def test_the_order_of_files_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    names = ["b/z.txt", "a.txt", "b.txt", "a/x.txt"]
    write(tmp_path, *names)
    real = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: reversed(list(real(*a, **k))))
    assert ids(tmp_path, Walk({".txt"}, gitignore=False)) == sorted(names)


def test_inner_suffix():
    names = ["a.TXT.gz", "a.Py.ZST", "a.txt", "a.gz", "a", "a.b.Csv", "a.gz.bz2"]
    suffixes = [inner_suffix(Path(name)) for name in names]
    assert suffixes == [".txt", ".py", ".txt", "", "", ".csv", ".gz"]


def test_pipes_links_and_loops_in_a_directory(tmp_path):
    write(tmp_path, "a.txt", "d/b.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "d" / "up").symlink_to("..")
    (tmp_path / "linked.txt").symlink_to("a.txt")  # the same file again: counts once
    found = find_files("data.path", str(tmp_path), TEXT)
    assert [name for name, _ in found.files] == ["a.txt", "d/b.txt"]
    assert found.skipped == {"hidden or special files": 3, "links to directories": 1}


def test_a_directory_that_is_a_link_is_read(tmp_path):
    write(tmp_path, "real/a.txt")
    (tmp_path / "link").symlink_to("real")
    assert ids(tmp_path / "link") == ["a.txt"]
    (tmp_path / "file").symlink_to("real/a.txt")
    assert ids(tmp_path / "file") == ["file"]


def test_what_looks_like_a_url_is_a_path_where_it_is_there(tmp_path):
    write(tmp_path, "a:/b.txt")
    assert ids(f"{tmp_path}/a://b.txt") == ["b.txt"]
    with pytest.raises(InputError, match="text is read from http and https URLs"):
        ids(f"{tmp_path}/a://c.txt")


def test_globs_and_lists_of_paths(tmp_path):
    write(tmp_path, "a.log", "b.log", "d/c.log", "venv/d.log", "e/pyvenv.cfg", "e/lib/x.log")
    write(tmp_path, ".h/x.log", "d/.x.log", "x, y.txt", "q?[1].txt", "qa1.txt", "venv/own.txt")
    write(tmp_path, "venv/pyvenv.cfg")
    (tmp_path / "f.log").mkdir()  # matches, but is no file
    assert ids(f"{tmp_path}/*.log") == ["a.log", "b.log"]
    assert ids(f"{tmp_path}/**/*.log") == ["a.log", "b.log", "d/c.log"]
    assert ids(f"{tmp_path}/[bd]*/*.log") == ["d/c.log"]
    assert ids(f"{tmp_path}/venv/*.txt") == ["own.txt"]  # asked for by name
    listed = f"{tmp_path}/b.log, {tmp_path}/*.log,,{tmp_path}/d/c.log,"
    assert ids(listed) == ["b.log", "a.log", "c.log"]
    assert ids(f"{tmp_path}/x, y.txt") == ["x, y.txt"]
    assert ids(f"{tmp_path}/q?[1].txt") == ["q?[1].txt"]  # is there by that name


def test_a_glob_through_a_loop_of_links_ends_and_counts_each_file_once(tmp_path):
    write(tmp_path, "a.txt", "d/b.txt")
    (tmp_path / "d" / "up").symlink_to("..")
    (tmp_path / "d" / "here").symlink_to(".")  # with a second one there is no end of ways
    (tmp_path / "there").symlink_to(".")
    for pattern in ("**/*.txt", "**", "*/**/*.txt", "**/**/*.txt"):
        found = sorted(Path(name).name for name in ids(f"{tmp_path}/{pattern}"))
        assert found == ["a.txt", "b.txt"], pattern
    skipped = find_files("data.path", f"{tmp_path}/**/*.txt", TEXT).skipped
    assert skipped == {"links to directories": 3}


def test_relative_paths_home_and_white_space(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", " b.txt ", "d/c.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ids("*.txt") == ["a.txt"]
    assert ids("~/d") == ids("~/d/*.txt") == ids(" d ") == ids("d,./d") == ["c.txt"]
    assert ids(" b.txt ") == [" b.txt "]
    assert ids("./**/*.txt") == ["a.txt", "d/c.txt"]
    assert ids(".") == ["a.txt", "d/c.txt"]


def test_the_same_file_twice_counts_once_and_directories_add_up(tmp_path):
    write(tmp_path, "d/a.txt", "d/x.png", "e/b.txt", "e/y.png", "e/z.png")
    (tmp_path / "a").symlink_to("d/a.txt")
    found = find_files("data.path", f"{tmp_path}/a,{tmp_path}/e,{tmp_path}/d", TEXT)
    assert [name for name, _ in found.files] == ["a", "b.txt"]
    assert found.skipped == {".png files": 3}


def test_all_other_suffixes_are_counted_and_twenty_named(tmp_path):
    write(tmp_path, "a.txt", *(f"{n}.s{kind}" for kind in range(7) for n in range(8 - kind)))
    listed = {f".s{kind} files": 8 - kind for kind in range(5)}
    found = find_files("data.path", str(tmp_path), TEXT)
    assert found.skipped == {**listed, "files of other types (.s5 x 3, .s6 x 2)": 5}
    write(tmp_path, *(f"x.t{kind:02}" for kind in range(14)))
    [*_, (reason, count)] = find_files("data.path", str(tmp_path), TEXT).skipped.items()
    assert count == 5 + 14 and reason.count(" x 1") == 13 and reason.endswith("x 1, ...)")
    (tmp_path / "x.t13").unlink()
    [*_, (reason, count)] = find_files("data.path", str(tmp_path), TEXT).skipped.items()
    assert count == 5 + 13 and reason.count(" x 1") == 13 and "..." not in reason


def test_a_named_file_is_taken_whatever_it_is(tmp_path):
    write(tmp_path, **{"a.png": "1234", ".gitignore": "*", "venv/b": "1234"})
    small = Walk({".txt"}, max_file_bytes=1)
    assert ids(f"{tmp_path}/a.png,{tmp_path}/venv/b", small) == ["a.png", "b"]
    assert ids(f"{tmp_path}/*.png", small) == ["a.png"]


def test_large_files_are_passed_over_by_choice(tmp_path):
    write(tmp_path, **{"a.txt": "1234", "b.txt": "12345"})
    found = find_files("data.path", str(tmp_path), Walk({".txt"}, max_file_bytes=4))
    assert [name for name, _ in found.files] == ["a.txt"]
    assert found.skipped == {"files larger than data.max_file_bytes": 1}
    assert ids(tmp_path) == ["a.txt", "b.txt"]
    with pytest.raises(InputError, match=r"\.txt x 2; skipped: 2 files larger than data\.max"):
        ids(tmp_path, Walk({".txt"}, max_file_bytes=3))


class TestGitignore:
    def test_nested_files_negation_and_directories(self, tmp_path):
        kept = ["a.txt", "build.txt", "keep.tmp.txt", "s/a.md", "s/only/deep/t.txt", "s/x.md"]
        write(tmp_path, *kept, "b.tmp.txt", "build/a.txt", "s/build/a.txt", "s/c.tmp.txt")
        write(tmp_path, "out/a.txt", "out/keep.txt", "s/t.txt", "only/t.txt", "x.md", "s/d/x.md")
        rules = "# a comment\n*.tmp.txt\n!keep.tmp.txt\nbuild/\n/out/*\n/only\nx.md\n"
        write(tmp_path, **{".gitignore": rules, "out/.gitignore": "*\n"})
        write(tmp_path, **{"s/.gitignore": "/t.txt\n!x.md\n", "s/d/.gitignore": "x.*\n"})
        found = find_files("data.path", str(tmp_path), TEXT)
        assert [name for name, _ in found.files] == sorted(kept)
        assert found.skipped["files ignored by .gitignore"] == 7
        assert found.skipped["directories ignored by .gitignore"] == 3
        assert len(ids(tmp_path, Walk({".txt", ".md"}, gitignore=False))) == 16

    @pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
    def test_it_agrees_with_git(self, tmp_path):
        rules = "\ufeffa?.txt\r\n*.md\n!/s/*.md\n**/deep/\n\\#x.txt\nsp \\ \n[bc].txt\n!b.txt\n"
        write(tmp_path, **{".gitignore": rules, "s/.gitignore": "!a1.txt\nu\u2028v.txt\n"})
        names = ["a1.txt", "a12.txt", "m.md", "s/m.md", "s/t/m.md", "deep/x.txt", "s/deep/x.txt"]
        names += ["#x.txt", "b.txt", "c.txt", "s/a1.txt", "s/t/a1.txt", "t/a1.txt", "v.txt"]
        write(tmp_path, *names, "s/u\u2028v.txt", "s/v.txt")
        environment = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
        git = ["git", "-C", str(tmp_path)]
        subprocess.run([*git, "init", "-q"], check=True, env=environment)
        listed = subprocess.run(
            [*git, "ls-files", "-z", "--others", "--exclude-standard"],
            check=True,
            env=environment,
            capture_output=True,
            text=True,
        ).stdout
        expected = {name for name in listed.split("\0") if not Path(name).name.startswith(".")}
        assert set(ids(tmp_path)) == expected - {""}
        assert len(expected) > 5

    @pytest.mark.parametrize("below", ["", "d/"])
    def test_one_that_names_everything_is_an_error_that_names_the_field(self, tmp_path, below):
        write(tmp_path, **{".gitignore": "*\n", f"{below}a.txt": "one"})
        with pytest.raises(InputError, match=r"ignored by \.gitignore.*data\.gitignore=False"):
            ids(tmp_path)
        assert ids(tmp_path, Walk({".txt"}, gitignore=False)) == [f"{below}a.txt"]
        with pytest.raises(InputError, match=r"files found: \.txt x 1; "):
            ids(tmp_path, Walk({".md"}, gitignore=False))

    def test_a_pattern_that_is_none(self, tmp_path, monkeypatch):
        write(tmp_path, **{".gitignore": "*.md\n", "a.txt": "one"})

        def refuse(lines):
            raise ValueError("Invalid git pattern")

        monkeypatch.setattr(paths.pathspec.GitIgnoreSpec, "from_lines", refuse)
        with pytest.raises(InputError, match=r"\.gitignore \(Invalid git.*data\.gitignore=False"):
            ids(tmp_path)

    def test_what_is_no_file_is_not_read(self, tmp_path):
        write(tmp_path, "a.txt", "d/b.txt", "e/c.txt")
        os.mkfifo(tmp_path / ".gitignore")
        (tmp_path / "d" / ".gitignore").symlink_to("nowhere")
        (tmp_path / "e" / ".gitignore").mkdir()
        assert ids(tmp_path) == ["a.txt", "d/b.txt", "e/c.txt"]

    def test_one_that_cannot_be_read(self, tmp_path, monkeypatch):
        write(tmp_path, **{".gitignore": "*", "a.txt": "one"})
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: os.open("/nowhere/at/all", 0))
        with pytest.raises(InputError, match=r"\.gitignore \(No such file.*a readable file"):
            ids(tmp_path)


@pytest.mark.parametrize(
    "files, spec, said",
    [
        ([], "missing.txt", r"missing\.txt'; expected an existing file.*`data\.path=PATH`"),
        ([], "missing*.txt", r"missing\*\.txt'; expected a pattern that matches a file$"),
        (["venv/a.txt"], "**/*.txt", r"expected a pattern that matches a file$"),
        (["a.txt"], "a.txt, {}/b.txt", r"b\.txt'; expected an existing"),
        ([], "", r"files found: none; skipped: none\)'.*text files \(\.txt"),
        (["a.weights"], "", r"files found: \.weights x 1; skipped: 1 \.weights files\).*\*\.weig"),
        (["a", "b", "c.x"], "", r"files found: no suffix x 2, \.x x 1; .*\*\*/\*'$"),
        (["a.txt"], "a.txt/b", r"a\.txt/b \(Not a directory\)'; expected a readable"),
        ([], "x" * 300, r"xxx \(File name too long\)"),
    ],
)
def test_what_is_refused(tmp_path, files, spec, said):
    write(tmp_path, *files)
    many = Walk({f".{number}" for number in range(9)} | {".txt"})
    with pytest.raises(InputError, match=said) as caught:
        ids(f"{tmp_path}/{spec.format(tmp_path)}", many)
    assert str(caught.value).startswith("data.path: got ")
    assert "\n" not in str(caught.value)


def test_a_few_wanted_kinds_are_named(tmp_path):
    with pytest.raises(InputError, match=r"a directory with \.a, \.b files$"):
        ids(tmp_path, Walk({".b", ".a"}))
    with pytest.raises(InputError, match=r"got ' , '; expected a file, a directory or a glob$"):
        ids(" , ")


def test_special_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(InputError, match="pipe, socket or device"):
        ids(tmp_path / "pipe")
    with pytest.raises(InputError, match="loop .*symbolic links"):
        ids(tmp_path / "loop")
    with pytest.raises(InputError, match="broken'; expected an existing file"):
        ids(tmp_path / "broken")


class TestUnreadable:
    """Tests may run as root, whom no permission stops."""

    def test_directory(self, tmp_path, monkeypatch):
        write(tmp_path, "a.txt", "d/b.txt")
        real = os.scandir

        def scandir(path):
            if str(path).endswith("/d"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(InputError, match=r"/d \(Permission denied\)'; expected a readable dir"):
            ids(tmp_path)

    def test_directory_whose_files_cannot_be_looked_at(self, tmp_path, monkeypatch):
        write(tmp_path, "a.txt", "d/b.txt")
        real = Path.stat

        def stat(path, **options):
            if path.parent.name == "d":
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, **options)

        monkeypatch.setattr(Path, "stat", stat)
        for spec in (tmp_path, f"{tmp_path}/**/*.txt"):
            with pytest.raises(InputError, match=r"d/b\.txt \(Permission denied\)'; .*a readable"):
                ids(spec)


class TestSignature:
    @pytest.fixture(autouse=True)
    def settled(self, monkeypatch):
        monkeypatch.setattr(paths, "_SETTLED_SECONDS", -60.0)

    @pytest.fixture
    def files(self, tmp_path):
        write(tmp_path, "a.txt", "b.txt")
        return [tmp_path / "a.txt", tmp_path / "b.txt"]

    def test_it_stays_while_nothing_changes(self, files):
        first = signature_of(files, ("text", 1))
        assert re.fullmatch("[0-9a-f]{64}", first)
        assert signature_of(iter(files), ("text", 1)) == first

    @pytest.mark.parametrize("change", ["size", "content", "mtime", "name", "order", "options"])
    def test_it_changes(self, files, change):
        first, options = signature_of(files, 1), 1
        before = files[0].stat()
        match change:
            case "size":
                files[0].write_text("longer text")
                os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
            case "content":  # a program may set the time back; the kernel's own stamp remains
                time.sleep(0.02)  # a tick of its clock
                files[0].write_text("A.txt")
                os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
            case "mtime":
                os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
            case "name":
                files[0] = files[0].rename(files[0].with_name("c.txt"))
            case "order":
                files.reverse()
            case "options":
                options = 2
        assert signature_of(files, options) not in (first, "")

    @pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns"])
    def test_each_part_of_a_files_state_counts(self, files, monkeypatch, field):
        first = signature_of(files, 1)
        real = Path.stat

        class Changed:
            def __init__(self, found):
                self.found = found

            def __getattr__(self, name):
                return getattr(self.found, name) + (name == field)

        monkeypatch.setattr(Path, "stat", lambda path: Changed(real(path)))
        assert signature_of(files, 1) not in (first, "")

    def test_the_name_counts_by_itself(self, files, monkeypatch):
        state = files[0].stat()
        monkeypatch.setattr(Path, "stat", lambda path: state)
        assert signature_of(files[:1], 1) != signature_of(files[1:], 1)

    def test_none_for_young_files_and_files_that_are_gone(self, files, monkeypatch, tmp_path):
        assert signature_of([*files, tmp_path / "gone"], 1) == ""
        monkeypatch.setattr(paths, "_SETTLED_SECONDS", 2.0)
        assert signature_of(files, 1) == ""
        os.utime(files[0], (0, 0))  # set back: still changed just now
        assert signature_of(files[:1], 1) == ""
        now = time.time()
        monkeypatch.setattr(paths.time, "time", lambda: now + 3)
        assert signature_of(files, 1) != ""
        os.utime(files[1], (now + 2, now + 2))
        assert signature_of(files, 1) == ""


def test_the_home_of_nobody_is_a_name_like_any_other():
    with pytest.raises(InputError, match=r"data\.path: got '~nobody-here/x\.txt'; expected "):
        ids("~nobody-here/x.txt")


def test_a_pattern_that_git_would_not_take_is_named(tmp_path):
    write(tmp_path, "a.txt", **{".gitignore": "[z-a].log\n"})
    with pytest.raises(InputError, match=r"\.gitignore \(.*; try `data\.gitignore=False"):
        ids(tmp_path)
