"""What a day with the results looks like from Python, on the shipped tiny models, in half a minute.

Run it in the project's folder: `python docs/examples/results.py`. In an editor that knows cells (`# %%`) it is a
notebook. `make test` runs it, too.
"""

# %% A delta to look at: what training added to the target, as the ceiling of the table has it.
import subprocess
import tempfile
from pathlib import Path

TARGET, TRAINED = "data/tiny/sibling-early", "data/tiny/sibling-chat"
folder = Path(tempfile.mkdtemp())
command = f"pkt derive --code own --target {TARGET} --source {TRAINED} --out {folder}/row"
subprocess.run(command.split(), check=True)

# %% What it is, and how large: changes by label, each read when asked for.
from pkt_stages import load_delta

delta = load_delta(folder / "row")
print(delta.meta["command"], delta.meta["target"]["name"], delta.kinds)
change = delta["delta"]
for name, matrix in list(change.weights.items())[:3]:
    print(f"{name:50} {list(matrix.shape)} norm {matrix.norm():.3f}")

# %% The target with the change, and half of it, as transformers models.
from transformers import AutoTokenizer

from pkt_stages import merge

tokenizer = AutoTokenizer.from_pretrained(TARGET)
question = [
    {"role": "user", "content": "Answer the following question.\n\nQuestion: Tom has 3 pens and buys 4. How many?"}
]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
for scale in (1.0, 0.5):
    model = merge(TARGET, delta, scale=scale)
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print(scale, repr(tokenizer.decode(answer, skip_special_tokens=True)))

# %% All scores of a profile: a list of dicts, so `pandas.DataFrame(rows)` is a table.
from pkt_stages import read_scores

rows = read_scores("params.yaml")
best = sorted((row for row in rows if row["task"] == "gsm8k"), key=lambda row: -row["nats"])
for row in best[:5]:
    print(f"{row['row']:28} {row['source'] or '':22} {row['points']:5.1f} points {row['nats']:7.3f} nats, n {row['n']}")

# %% What a model answered, an example at a time.
from pkt_stages import read_predictions

for command in (
    f"pkt prepare --task mmlu --data data/tiny/mmlu --out {folder}/examples",
    f"pkt evaluate --task mmlu --model {TARGET} --delta {folder}/row --test {folder}/examples/test.jsonl --limit 32"
    f" --dtype float32 --out {folder}/metrics.json --predictions {folder}/predictions.jsonl --scratch {folder}/scratch",
):
    subprocess.run(command.split(), check=True)
wrong = [row for row in read_predictions(folder / "predictions.jsonl") if not row["correct"]]
print(f"{len(wrong)} of 32 wrong; the first: {wrong[0]['id']}, said {wrong[0]['extracted']}")
