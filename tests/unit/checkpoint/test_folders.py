"""Complete or absent: markers, publication, retention and cleaning up, without an engine."""

from pathlib import Path

import pytest

from ds_higgs.checkpoint import find_checkpoint
from ds_higgs.checkpoint.folders import begin_partial, clean_up, list_checkpoints, publish, retain
from ds_higgs.checkpoint.marker import MARKER_NAME, Marker, MarkerError, encode_marker, find_damage, read_marker
from ds_higgs.checkpoint.writing import HashingFile
from ds_higgs.errors import UserError

CONTENTS = {"weights.pt": b"w" * 5000, "rank-00000.safetensors": b"r" * 100, "state.json": b"{}"}


def write_checkpoint(run_dir: Path, step: int, validation_loss: float | None = None) -> Path:
    partial = begin_partial(run_dir / "checkpoints", step)
    records = {}
    for name, content in CONTENTS.items():
        file = HashingFile(partial / name)
        file.write(content)
        records[name] = file.finish()
    marker = Marker(
        step=step,
        world_size=1,
        zero_stage=2,
        precision="fp32",
        trainable=[("lora_A", [2, 3])],
        fixed={"lora.rank": 2},
        validation_loss=validation_loss,
        versions={},
        files=records,
    )
    (partial / MARKER_NAME).write_bytes(encode_marker(marker))
    return publish(partial, step)


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in list_checkpoints(run_dir / "checkpoints"))


def test_marker_survives_the_round_trip(tmp_path):
    path = write_checkpoint(tmp_path, 5, validation_loss=1.25)
    marker = read_marker(path)
    assert (marker.step, marker.validation_loss, marker.trainable) == (5, 1.25, [("lora_A", [2, 3])])
    assert set(marker.files) == set(CONTENTS)
    assert find_damage(path, marker.files) == []
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005"


@pytest.mark.parametrize("name", [*CONTENTS, MARKER_NAME])
@pytest.mark.parametrize("fault", ["truncate", "flip", "delete"])
def test_damage_is_refused_with_the_files_name(tmp_path, name, fault):
    older = write_checkpoint(tmp_path, 1)
    newest = write_checkpoint(tmp_path, 2)
    path = newest / name
    content = path.read_bytes()
    if fault == "truncate":
        path.write_bytes(content[:-1])
    elif fault == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()
    assert find_checkpoint(tmp_path, resume="auto") == older
    with pytest.raises(UserError, match=rf"(?s){name}.*to go on: --checkpoint.resume auto takes"):
        find_checkpoint(tmp_path, resume=str(newest))
    assert newest.is_dir(), "a damaged checkpoint is left for people to look at"


def test_a_marker_changed_by_hand_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 3, validation_loss=2.5) / MARKER_NAME
    path.write_text(path.read_text().replace("2.5", "0.5"))
    with pytest.raises(MarkerError, match="own checksum"):
        read_marker(path.parent)


def test_a_partial_checkpoint_is_never_found_and_is_cleaned_up(tmp_path):
    complete = write_checkpoint(tmp_path, 1)
    partial = begin_partial(tmp_path / "checkpoints", 2)
    (partial / "weights.pt").write_bytes(b"half")
    assert find_checkpoint(tmp_path, resume="auto") == complete
    assert not partial.exists()


def test_auto_without_checkpoints_starts_at_zero(tmp_path):
    assert find_checkpoint(tmp_path, resume="auto") is None


def test_a_path_may_be_a_runs_folder(tmp_path):
    path = write_checkpoint(tmp_path, 4)
    assert find_checkpoint(tmp_path / "other", resume=str(tmp_path)) == path


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path, resume=str(tmp_path / "step-00000009"))


def test_never_keeps_the_old_runs_checkpoints_out_of_the_way(tmp_path):
    write_checkpoint(tmp_path, 7)
    assert find_checkpoint(tmp_path, resume="never") is None
    assert steps(tmp_path) == []
    assert (tmp_path / "checkpoints" / "superseded" / "step-00000007-1" / MARKER_NAME).is_file()
    assert find_checkpoint(tmp_path, resume="auto") is None


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None}
    for step, loss in losses.items():
        newest = write_checkpoint(tmp_path, step, loss)
    retain(newest.parent, newest=newest, keep_latest=2)
    assert steps(tmp_path) == [2, 4, 5]


@pytest.mark.parametrize(("times", "kept"), [(0.5, [1, 5]), (2.5, [1, 5]), (3.0, [1, 4, 5]), (9.0, [1, 3, 4, 5])])
def test_retention_by_space_keeps_the_newest_and_the_best(tmp_path, times, kept):
    for step, loss in {1: 1.0, 2: 3.0, 3: 3.0, 4: 3.0, 5: 3.0}.items():
        newest = write_checkpoint(tmp_path, step, loss)
    size = sum(len(content) for content in CONTENTS.values())
    retain(newest.parent, newest=newest, keep_latest=3, keep_bytes=times * size)
    assert steps(tmp_path) == kept


def test_retention_does_not_count_incomplete_checkpoints(tmp_path):
    for step in (1, 2, 3):
        newest = write_checkpoint(tmp_path, step)
    (newest.parent / "step-00000002" / MARKER_NAME).unlink()
    retain(newest.parent, newest=newest, keep_latest=2)
    assert steps(tmp_path) == [1, 2, 3]


def test_going_back_moves_the_later_checkpoints_aside(tmp_path):
    write_checkpoint(tmp_path, 9)
    newest = write_checkpoint(tmp_path, 4)
    retain(newest.parent, newest=newest, keep_latest=3)
    assert steps(tmp_path) == [4]
    assert (newest.parent / "superseded" / "step-00000009-1").is_dir()


def test_saving_the_same_step_again_replaces_it(tmp_path):
    first = write_checkpoint(tmp_path, 4, validation_loss=1.0)
    second = write_checkpoint(tmp_path, 4, validation_loss=2.0)
    assert first == second
    assert read_marker(second).validation_loss == 2.0
    assert sorted(path.name for path in second.parent.iterdir()) == ["latest", "step-00000004"]


def test_killed_between_the_renames_of_a_replacement(tmp_path):
    path = write_checkpoint(tmp_path, 4)
    path.rename(path.parent / f".replaced-{path.name}")
    assert find_checkpoint(tmp_path, resume="auto") == path
    path.rename(path.parent / f".replaced-{path.name}")
    write_checkpoint(tmp_path, 4)
    clean_up(path.parent)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["latest", "step-00000004"]


def test_write_errors_wait_until_the_file_is_finished(tmp_path):
    file = HashingFile(Path("/dev/full"))
    assert file.write(b"x" * (1 << 21)) == 1 << 21
    assert file.write(b"more") == 4
    with pytest.raises(OSError, match="No space left"):
        file.finish()
