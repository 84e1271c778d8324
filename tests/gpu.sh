#!/usr/bin/env bash
# What a GPU has to show, in at most nine minutes and one table:
#
#   pip install -c constraints.txt -e ".[test,bitsandbytes]" liger-kernel && tests/gpu.sh [DIRECTORY]
#
# A step beside a bare forward and backward, TRL and TRL with Liger's kernels: every weight of a Llama of 1.24B on
# `long` and `chat`, adapters on 8B in bfloat16 and on nf4; where the time of the first goes; and what runs on a GPU
# alone. Nothing is downloaded: weights are drawn from their configuration. Where no GPU is at hand (or with GPU=0)
# the same rows are measured at tiny sizes on the CPU, in some two minutes of two cores. DIRECTORY (outputs/gpu) holds
# what every row left behind, and its log; a row that fails says why and the others go on.
set -u
cd "$(dirname "$0")/.." || exit
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
OUT=$(realpath -m "${1:-outputs/gpu}")
ENDS=$((SECONDS + ${LIMIT:-525})) # seconds; what ends in time and the table take the rest of nine minutes
rm -rf "$OUT" && mkdir -p "$OUT" || exit
NAME=$(python -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
[ "${GPU:-1}" = 0 ] && NAME=

llama() { # width, width of the MLP, layers, heads, heads of keys
  echo "model.config.hidden_size=$1 model.config.intermediate_size=$2 model.config.num_hidden_layers=$3" \
    "model.config.num_attention_heads=$4 model.config.num_key_value_heads=$5"
}
TIED=model.config.tie_word_embeddings
if [ -n "$NAME" ]; then
  # bfloat16, dense: https://www.nvidia.com/en-us/data-center, of the SXM cards
  case $NAME in *H100* | *H200*) PEAK=989e12 ;; *B200*) PEAK=2250e12 ;; *A100*) PEAK=312e12 ;; *) PEAK=null ;; esac
  AT="hardware=gpu hardware.logits_mib=2048 model.dtype=bfloat16 peak_flops=$PEAK tolerance=5e-2 lr=1e-6"
  AT="$AT vocabularies=[131072] steps=3 repetitions=3 trajectory=5"
  WHOLE="$(llama 2048 8192 16 32 8) $TIED=true hardware.precision=bf16-true batch_size=16"
  LARGE="$(llama 4096 14336 32 32 8) $TIED=false hardware.precision=bf16-mixed batch_size=4 apart=true"
  LOOK="hardware=gpu model.dtype=bfloat16 hardware.logits_mib=2048 lr=1e-6 $WHOLE"
  LOOK="$LOOK prompt=[460,564] completion=[58,70] vocabulary=131072"
  SMALL="hardware=gpu steps=3 repetitions=3 memory=false" TOGETHER=8
else
  TINY="hardware=cpu hardware.threads=1 batch_size=2 steps=1 warmup=1 model.config.max_position_embeddings=64"
  AT="$TINY peak_flops=1e12 vocabularies=[512] repetitions=3 trajectory=2 memory=false tolerance=1e-3"
  AT="$AT shapes.long.prompt=[20,30] shapes.long.completion=[4,6] shapes.chat.prompt=[6,9] shapes.chat.completion=[4,6]"
  WHOLE="$(llama 32 48 2 2 2) $TIED=true"
  LARGE="$(llama 64 96 2 2 1) $TIED=false apart=true"
  SHORT="prompt=[6,9] completion=[4,6] vocabulary=512"
  LOOK="$TINY $WHOLE $SHORT"
  SMALL="$TINY $(llama 64 96 2 2 2) $SHORT repetitions=3 memory=false" TOGETHER=2
fi
ALL='contestants=[ours,floor,trl,liger]'
LORA="model.lora.rank=16"

row() { # name, module, words: one measurement, for as long as there is time
  local name=$1 module=$2 began=$SECONDS left=$((ENDS - SECONDS))
  shift 2
  mkdir "$OUT/$name"
  if [ $left -lt 20 ]; then echo "error: no time was left" >"$OUT/$name/log"; return; fi
  timeout -k 5 $left python -m "spo_lightning.$module" "$@" "hydra.run.dir=$OUT/$name/run" >"$OUT/$name/log" 2>&1
  local code=$?
  [ $code = 124 ] && echo "error: no time was left" >>"$OUT/$name/log"
  echo "$name: exit code $code after $((SECONDS - began)) s" >&2
}
some() { # the same beside others, TOGETHER at a time
  while [ "$(jobs -rp | wc -l)" -ge $TOGETHER ]; do wait -n; done
  row "$@" &
}

# What runs on a GPU alone, or otherwise there than here: beside the same step as it is by default, one by one
knob() { # name, words of the training command
  local name=$1 words
  shift
  words=$(printf '"%s",' "$@")
  some "$name" bench what=knobs $SMALL 'only=[mine]' "+knobs.mine=[${words%,}]"
}
knob tokens_per_batch data.tokens_per_batch=auto
knob compile hardware.compile=true
knob nf4 model.lora.rank=4 model.quantize=nf4
knob int8 model.lora.rank=4 model.quantize=int8
knob adamw_8bit optimizer=adamw_8bit
knob paged_adamw_8bit optimizer=paged_adamw_8bit
some offload train data=slips data.prompts=32 data.eval_prompts=8 data.sft_rows=32 sft.max_steps=2 max_steps=2 \
  batch_size=4 eval.max_new_tokens=4 hardware=fsdp hardware.sharding.offload=true report.enabled=false \
  hardware.accelerator="$([ -n "$NAME" ] && echo gpu || echo cpu)"
wait

# What is timed, each alone
row whole bench $AT $WHOLE "$ALL" 'only=[long,chat]'
row profile bench what=profile $LOOK steps=2 trace=true
row bf16 bench $AT $LARGE $LORA "$ALL" 'only=[long]'
row nf4_large bench $AT $LARGE $LORA model.quantize=nf4 "$ALL" 'only=[long]'

python - "$OUT" "${NAME:-CPU, tiny sizes}" <<'PY'
import json
import sys
from pathlib import Path
from statistics import median

out, device = Path(sys.argv[1]), sys.argv[2]
STEPS = {"whole": "1.24B, every weight", "bf16": "8B, adapters, bfloat16", "nf4_large": "8B, adapters on nf4"}
KNOBS = ("tokens_per_batch", "compile", "nf4", "int8", "adamw_8bit", "paged_adamw_8bit")
RATIOS = {"ours / floor": "over_floor", "TRL / ours": "trl_over", "TRL + Liger / ours": "liger_over"}
HEAD = ("row", "ours, ms", *RATIOS, "utilisation", "peak, GiB", "what it says")


def read(name):
    path = out / name / "run/bench.json"
    return json.loads(path.read_text()) if path.exists() else {}


def said(name):
    """What went wrong, or the last that was said."""
    lines = [line for line in (out / name / "log").read_text().splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith("error: ")]
    return (wrong or lines or ["nothing"])[-1][:160]


rows = []
for name, title in STEPS.items():
    cells = read(name).get("cells", [])
    for cell in cells:
        ours = median(cell["seconds"]["ours"])
        gib = cell["memory_mib"].get("ours")
        apart = cell["trajectory_difference"]
        rows.append({
            "row": f"{title}, {cell['shape']}",
            "ours, ms": f"{1000 * ours:.1f}",
            **{key: f"{cell[ratio]['median']:.2f}" for key, ratio in RATIOS.items() if ratio in cell},
            "utilisation": f"{cell['utilisation']['ours']:.2f}" if "utilisation" in cell else "",
            "peak, GiB": f"{gib / 1024:.1f}" if gib else "",
            "what it says": "" if apart is None else f"losses differ by {apart:.1e}",
        })
    if len(cells) < (2 if name == "whole" else 1):
        rows.append({"row": title, "what it says": said(name)})
looked = read("profile")
if looked:
    first = looked["kernels"][0]
    words = f"busy {looked['busy']:.2f} of the time, {looked['waits']:.1f} waits, {looked['launched']:.0f} calls;"
    words += f" most in {first['name'][:40]}, {first['seconds'] / looked['seconds']:.2f}"
    rows.append({"row": "profile of the first", "ours, ms": f"{1000 * looked['seconds']:.1f}", "what it says": words})
else:
    rows.append({"row": "profile of the first", "what it says": said("profile")})
for name in KNOBS:
    found = read(name).get("knobs", {}).get("mine")
    if found:
        words = f"{found['time']['median']:.2f} of the default's time, "
        words += f"losses differ by {found['loss_difference']:.1e}"
        row = {"row": name, "ours, ms": f"{1000 * median(found['seconds']):.1f}", "what it says": words}
    else:
        row = {"row": name, "what it says": said(name)}
    rows.append(row)
done = (out / "offload/run/metrics.json").exists()
rows.append({"row": "sharding.offload", "what it says": "ran" if done else said("offload")})

cells = [HEAD, *([row.get(key, "") for key in HEAD] for row in rows)]
widths = [max(map(len, column)) for column in zip(*cells)]
cells.insert(1, ["-" * width for width in widths])
table = "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells)
targets = "wanted on a GPU: TRL / ours from 2.0, TRL + Liger / ours from 1.6, utilisation .45, ours / floor to 1.05"
text = f"{device}\n\n{table}\n\n{targets}\n"
(out / "table.md").write_text(text)
print(text, end="")
PY
