"""The demo: write the headline of a docstring from its body, offline, with what every installation carries.

Pairs are harvested from the installed packages for training and from the standard library for testing; the teacher
is shipped (dqbart/assets). So a newcomer sees a real compression, with a score on text that neither teacher nor
student was trained on, before bringing any data.
"""

from pathlib import Path
from typing import Any

from dqbart.recipe import LossWeights, Recipe

TEACHER = Path(__file__).parent / "assets" / "docstring-teacher"
TEST_EXAMPLES = 500
SHOWN = 5

RECIPE = dict(epochs=1.0, batch_size=64, max_source_length=128, max_target_length=32, evaluations=2, dev_subset=100)


def demo(output: Path, *, bits: str = "2-2-8", layers: str = "3-2", **changes: Any) -> dict[str, Any]:
    """Compress the shipped teacher into `output/model`, score both on the standard library's docstrings."""
    from dqbart.data.docstrings import write_docstrings
    from dqbart.evaluation.run import evaluate
    from dqbart.pipeline import compress

    files = write_docstrings(output / "data")
    recipe = Recipe(**{**RECIPE, "bits": bits, "layers": layers, "losses": LossWeights(), **changes})
    result = compress(
        str(TEACHER), files["train"], dev_data=files["validation"], recipe=recipe, output=output / "model"
    )
    answer = result.summary()
    scores, outputs = {}, {}
    for who, folder in (("teacher", TEACHER), ("student", result.folder)):
        scores[who], outputs[who] = evaluate(
            str(folder), files["test"], limit=TEST_EXAMPLES, generation={"max_length": 32}
        )
    print(f"test: {TEST_EXAMPLES} docstrings of the standard library")
    for who, result_score in scores.items():
        print(f"  {who:8s} {result_score}")
    for teacher_row, student_row in list(zip(outputs["teacher"], outputs["student"], strict=True))[:SHOWN]:
        print(f"\n  body     {teacher_row['source'][:200]}")
        print(f"  written  {teacher_row['reference']}")
        print(f"  teacher  {teacher_row['output']}")
        print(f"  student  {student_row['output']}")
    sizes = result.report["sizes"]
    print(f"\n  {sizes['file_bytes']:,} bytes, {sizes['ratio_to_fp32']} x smaller than the teacher in fp32")
    return answer | {"test": {who: s.values for who, s in scores.items()}}
