"""Ctrl-C while images are scored keeps the report of the batches that every run was scored on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn
from typer.testing import CliRunner

from hf_tokenprune import UniformConfig, pruned
from hf_tokenprune.cli import app
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.engine import current_config
from hf_tokenprune.evaluation import evaluate_paired, load_images, load_processor
from hf_tokenprune.evaluation.paired import InterruptedEvaluation
from hf_tokenprune.evaluation.turns import Turns
from hf_tokenprune.sharing.pretrained import class_of

pytest.importorskip("accelerate")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
BATCH = 4


@pytest.fixture
def model() -> nn.Module:
    from transformers import AutoConfig

    return class_of(AutoConfig.from_pretrained(MODEL_DIR)).from_pretrained(MODEL_DIR)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``interrupt(n)``: ctrl-C in the midst of the batch behind the n-th, in its last run."""

    def behind(batches: int) -> None:
        run, done = Turns.run, []

        def counted(self: Turns, name: str, *given: object) -> Tensor:
            done.append(name)
            if len(done) > (batches + 2) * len(self.arms) - 1:  # and once to warm up
                raise KeyboardInterrupt
            return run(self, name, *given)

        monkeypatch.setattr(Turns, "run", counted)

    return behind


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_what_is_scored_is_reported_and_the_model_is_as_before(
    batches: int, model: nn.Module, interrupt: Callable[[int], None]
) -> None:
    processor, digits = load_processor(MODEL_DIR), load_digits_split("test")
    images = load_images([digits[i] for i in range(4 * BATCH)])
    variants = {"half": lambda: pruned(model, UniformConfig(keep_ratios=0.5))}
    first = load_images([digits[i] for i in range(max(batches, 1) * BATCH)])
    expected = evaluate_paired(model, first, processor, variants, batch_size=BATCH, progress=False)
    interrupt(batches)
    with pytest.raises(KeyboardInterrupt) as found:
        evaluate_paired(model, images, processor, variants, batch_size=BATCH, progress=False)
    assert current_config(model) is None
    assert isinstance(found.value, InterruptedEvaluation) == bool(batches)
    if isinstance(found.value, InterruptedEvaluation):
        rows = found.value.report.rows
        assert [row.n for row in rows] == [batches * BATCH] * 2
        for row, alone in zip(rows, expected.rows, strict=True):
            assert (row.accuracy, row.agreement, row.kl) == (alone.accuracy, alone.agreement, alone.kl)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, digits = tmp_path_factory.mktemp("digits"), load_digits_split("test")
    for i in range(3 * BATCH):
        (path / str(digits[i]["label"])).mkdir(exist_ok=True)
        digits[i]["image"].save(path / str(digits[i]["label"]) / f"{i}.png")
    return str(path)


@pytest.mark.parametrize("batches", [0, 1])
def test_compare_saves_what_is_scored(
    batches: int, folder: str, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    pytest.importorskip("matplotlib")
    interrupt(batches)
    given = ["-m", "random", "-g", "0.12", "--batch-size", str(BATCH), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["compare", str(MODEL_DIR), folder, *given])
    assert result.exit_code == 130
    saved = tmp_path / "out" / "accuracy.md"
    if batches:
        assert f"the accuracy of 1 runs, on the first {BATCH} of {3 * BATCH} images, is in {saved}" in result.output
        assert saved.read_text().startswith(f"{BATCH} images ({BATCH} labelled")
        assert (tmp_path / "out" / "configs" / "random@0.12" / "prune_config.json").exists()
    else:
        assert "no batch of images was scored, and nothing is saved" in result.output and not saved.exists()


def test_eval_shows_what_is_scored(folder: str, interrupt: Callable[[int], None]) -> None:
    interrupt(1)
    result = CliRunner().invoke(app, ["eval", str(MODEL_DIR), folder, "-m", "random", "--batch-size", str(BATCH)])
    assert result.exit_code == 130 and f"{BATCH} images ({BATCH} labelled" in result.stdout
    assert f"interrupted: the table is of the first {BATCH} of {3 * BATCH} images" in result.output
