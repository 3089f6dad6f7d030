"""The lock of a folder: held, waited for, refused, and on file systems without locks."""

import errno
import fcntl
import os
import threading

import pytest

from cskd_jax.errors import UserError
from cskd_jax.runs import lock


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.01)
    return lambda seconds: monkeypatch.setattr(lock, "LOCAL_PATIENCE_SECONDS", seconds)


def test_refused_in_the_end(tmp_path, patience, capsys):
    patience(0.05)
    path, refused = tmp_path / "new" / "lock", pytest.raises(UserError, match="another job; wait for it to finish")
    with lock.locked(path, ""), refused, lock.locked(path, "another job"):
        pass
    assert capsys.readouterr().out.splitlines() == ["another job: waiting up to 0.05 s for it to finish"]


def test_another_machine_is_waited_for_longer(tmp_path, patience, monkeypatch, capsys):
    patience(60)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.05)
    with lock.locked(tmp_path / "lock", ""):
        (tmp_path / "lock").write_text("another machine")
        with (
            pytest.raises(UserError, match="another job; wait for it to finish"),
            lock.locked(tmp_path / "lock", "another job"),
        ):
            pass
    assert "waiting up to 0.05 s" in capsys.readouterr().out


def test_held_by_one_that_is_about_to_end(tmp_path, patience):
    patience(60)
    path, end = tmp_path / "lock", threading.Event()

    def hold():
        with lock.locked(path, ""):
            held.set()
            end.wait()

    held, holder = threading.Event(), threading.Thread(target=hold)
    holder.start()
    held.wait()
    threading.Timer(0.1, end.set).start()
    with lock.locked(path, "another job"):
        assert end.is_set()
    holder.join()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level("WARNING", logger="cskd_jax"), lock.locked(tmp_path / "lock", ""):
        pass
    assert f"{tmp_path / 'lock'}: this file system does not support locks ({os.strerror(number)})" in caplog.text


def test_a_folder_in_which_nothing_came_is_removed(tmp_path):
    for _ in range(2):
        with lock.locked(tmp_path / "a" / "b" / "lock", ""):
            assert (tmp_path / "a" / "b" / "lock").exists()
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="refused"), lock.locked(tmp_path / "a" / "b" / "lock", ""):
        raise UserError("refused")
    assert list((tmp_path / "a").iterdir()) == []
    with lock.locked(tmp_path / "a" / "b" / "lock", ""):
        (tmp_path / "a" / "b" / "results.json").touch()
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"lock", "results.json"}


def test_a_lock_that_its_holder_removes_is_held_by_one_at_a_time(tmp_path, patience):
    """One that waits for a file that is gone would hold a lock that nobody else sees."""
    patience(60)
    path, held, end = tmp_path / "new" / "lock", threading.Event(), threading.Event()

    def hold():
        with lock.locked(path, ""):
            held.set()
            end.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    threading.Timer(0.1, end.set).start()
    with lock.locked(path, "another job"):
        patience(0.05)
        refused = pytest.raises(UserError, match="a third")
        with refused, lock.locked(path, "a third"):
            pass
    holder.join()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_something_else_in_its_place(make, tmp_path):
    make(tmp_path / "lock")
    refused = pytest.raises(UserError, match=r"lock is not a regular file, but a file must be written there: remove it")
    with refused, lock.locked(tmp_path / "lock", ""):
        pass
