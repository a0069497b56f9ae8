"""Property: however a job is worked on and however each of its files loses its end, the next run mends and ends it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.batch.job import BatchJob
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.responder import Response
from tests.batch.scripted import IDENTITY, answers, read_lines, request, run_job, write_input

N = 12
STEPS = st.lists(st.sampled_from(["answer", "failure", "bad line", "checkpoint", "loss"]), max_size=40)


def lose_ends(paths: JobPaths, safe: dict[Path, int], data: st.DataObject) -> None:
    """Each file keeps what was brought to disk, and any part of what was written since, perhaps with zeros after it."""
    for path, least in safe.items():
        content = path.read_bytes()
        share = data.draw(st.integers(0, 20), label=path.name) / 20  # of sizes that differ from run to run
        kept = least + round(share * (len(content) - least))
        zeros = data.draw(st.integers(0, 30))
        path.write_bytes(content[:kept] + bytes(zeros if kept < len(content) else 0))


@given(steps=STEPS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_work_and_any_loss(steps: list[str], data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = write_input(folder / "in.jsonl", [request(f"id-{i}", f"prompt {i}") for i in range(N)])
        paths = JobPaths.beside(source, folder / "out.jsonl")
        job = BatchJob.open(paths, IDENTITY)
        files = (paths.output, paths.errors, paths.journal)
        safe = {path: path.stat().st_size for path in files}
        open_lines = list(range(1, N + 1))
        for step in steps:
            if step == "checkpoint":
                job.save(job.checkpoint())
                safe = {path: path.stat().st_size for path in files}
            elif step == "loss":
                job.close()
                lose_ends(paths, safe, data)
                job = BatchJob.open(paths, IDENTITY)
                open_lines = [line for line in range(1, N + 1) if not job.is_done(line)]
                assert job.counts.done == N - len(open_lines)
                assert len(read_lines(paths.output)) == job.counts.answered
                assert len(read_lines(paths.errors)) == job.counts.failed
            elif open_lines:
                line = open_lines.pop(data.draw(st.integers(0, len(open_lines) - 1)))
                if step == "bad line":
                    job.refuse(line, f"id-{line - 1}", "invalid_json", "bad")
                else:
                    text = f"prompt {line - 1}"[::-1]
                    status = 200 if step == "answer" else 500
                    job.keep(line, f"id-{line - 1}", Response(status, b'{"text":"%s"}' % text.encode(), "q"))
        job.close()
        run_job(paths)
        answered = answers(paths.output)
        failed = [line["custom_id"] for line in read_lines(paths.errors)]
        assert sorted([*answered, *failed]) == sorted(f"id-{i}" for i in range(N))
        assert all(answered[f"id-{i}"] == f"prompt {i}"[::-1] for i in range(N) if f"id-{i}" in answered)
