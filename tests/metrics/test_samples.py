"""`samples.jsonl` through kills, resumes, and whatever a model writes."""

from jaxtune.metrics.samples import NAME, add_samples, read_samples

# What ends a line for Python's `splitlines`, but for no reader of JSON lines.
ODD = 'one\u2028two\x85three\x0bfour\x1cfive\nsix'


def sample(step: int, completion: str = ODD) -> dict:
    return {'prompt': ODD, 'completion': completion, 'score': None, 'step': step}


def test_each_step_once_whatever_was_written(tmp_path):
    assert read_samples(tmp_path) == []
    add_samples(tmp_path, 0, [sample(0)])
    add_samples(tmp_path, 5, [sample(5), sample(5, 'last')])
    assert read_samples(tmp_path) == [sample(0), sample(5), sample(5, 'last')]
    with (tmp_path / NAME).open('a') as file:  # kill -9 within a line
        file.write('{"prompt": "tor')
    assert len(read_samples(tmp_path)) == 3
    add_samples(tmp_path, 5, [sample(5, 'again')])  # resumed from an earlier step
    assert read_samples(tmp_path) == [sample(0), sample(5, 'again')]
    assert [entry.name for entry in tmp_path.iterdir()] == [NAME]
