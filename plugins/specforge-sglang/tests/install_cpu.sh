#!/usr/bin/env bash
# install_cpu.sh VENV VERSION: a CPU-only SGLang for tests, in a venv of its own.
# SGLang pins a transformers of its own and asks for CUDA packages that a CPU test never calls,
# so its dependencies are named here instead of taken from its metadata.
set -euo pipefail
venv=$1
version=$2
here=$(cd "$(dirname "$0")" && pwd)
case $version in
  0.5.14) transformers=5.8.1 extra=() ;;
  0.5.15* | 0.5.16 | 0.5.17 | 0.5.18) transformers=5.8.1 extra=(xgrammar==0.2.1 apache-tvm-ffi==0.1.11) ;;
  0.5.19 | 0.5.20 | 0.5.21) transformers=5.19.0 extra=(xgrammar==0.2.1 apache-tvm-ffi==0.1.11) ;;
  *) transformers=5.19.0 extra=(xgrammar==0.2.7 apache-tvm-ffi==0.1.11) ;;
esac
python=${PYTHON:-python3}
"$python" -m venv "$venv"
# what is imported is compiled then, once
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile)
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# the largest part of all, with what is compiled of it: from where it is installed, if linked it can be
torch=("$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"/{torch,torchgen,functorch,torch-2.13.0*.dist-info})
if [ -d "${torch[3]}" ]; then
  cp -al "${torch[@]}" "$site" 2> /dev/null || rm -rf "$site"/torch{,gen,-*} "$site"/functorch
fi
"${pip[@]}" torch==2.13.0 "transformers==$transformers" -r "$here/cpu_requirements.txt"
"${pip[@]}" --no-deps "sglang==$version" triton==3.6.0 torchvision==0.28.0 ${extra[@]+"${extra[@]}"}
# torchvision's CUDA wheel registers operators that it lacks here; only its import must work
echo 'import sys, types; sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))' > "$site/torchvision_cpu.pth"
if [ "$version" != 0.5.14 ]; then # from 0.5.15 on its kernel package is imported, though not called
  mkdir -p "$site/sgl_kernel"
  cp "$here/sgl_kernel_stand_in.py" "$site/sgl_kernel/__init__.py"
fi
