#!/usr/bin/env bash
# Puts the pinned stack into Dataproc's interpreter: the customisation script of a custom image, or the same as an
# initialisation action of a cluster (development only: it needs a way to the package index).
#
#   customize.sh [etl|gpu] [--files FOLDER|gs://PREFIX] [--python PROGRAM] [--cuda FOLDER] [--dry-run]
#
# What is not said comes from the instance's metadata: couponflow-role, couponflow-files. FILES is the folder that
# `make image-requirements` writes (dist/image), by default the one of this script. Role gpu needs a base with the
# driver and a CUDA toolkit of torch's major version. pip resolves nothing and takes only what uv.lock has a hash for;
# Horovod alone is built, from its unmodified sdist. Ends with smoke_test.py, so an image that is made is one that
# works. --dry-run prints the commands and runs none.
set -euo pipefail

fail() { # WHAT_AND_WHAT_TO_DO
  printf 'customize.sh: %s\n' "$1" >&2
  exit 2
}

role='' files='' python=/opt/conda/default/bin/python cuda=/usr/local/cuda dry_run=no
while (($#)); do
  case $1 in
  etl | gpu) role=$1 ;;
  --files) files=${2-} && shift ;;
  --python) python=${2-} && shift ;;
  --cuda) cuda=${2-} && shift ;;
  --dry-run) dry_run=yes ;;
  *) fail "unknown argument $1; usage: customize.sh [etl|gpu] [--files FOLDER|gs://PREFIX] [--dry-run]" ;;
  esac
  shift
done

metadata() { # NAME: an attribute of this instance, or nothing
  local program=/usr/share/google/get_metadata_value
  [[ ! -x $program ]] || "$program" "attributes/$1" 2>/dev/null || true
}

run() { # COMMAND...: prints it, and runs it unless this is a dry run
  local word shown=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+*-]+$ ]] || word=${word@Q}
    shown+=" $word"
  done
  printf '%s\n' "${shown# }"
  [[ $dry_run == yes ]] || "$@"
}

[[ -n $role ]] || role=$(metadata couponflow-role)
[[ $role == etl || $role == gpu ]] || fail "role '$role': expected etl or gpu, as argument or metadata couponflow-role"
[[ -n $files ]] || files=$(metadata couponflow-files)
[[ -n $files ]] || files=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ $dry_run == yes ]]; then
  work=/tmp/couponflow-image
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
if [[ $files == gs://* ]]; then
  run gcloud storage cp "${files%/}/*" "$work/"
  files=$work
fi
[[ $dry_run == yes || -f $files/$role.txt ]] ||
  fail "no $files/$role.txt; give --files, or metadata couponflow-files: the folder of make image-requirements"

install() { # PROGRAM ARGUMENTS...: locked packages only, nothing resolved, no cache left behind
  run "$1" -m pip install --no-deps --require-hashes --no-cache-dir --disable-pip-version-check --quiet "${@:2}"
}

# The build tools lie in a folder of their own, so that none stays in the image.
build_horovod() {
  local nccl
  [[ $dry_run == yes || -x $cuda/bin/nvcc ]] ||
    fail "no $cuda/bin/nvcc; take a base image with the CUDA toolkit, or install Google's GPU driver first"
  install "$python" --only-binary :all: -r "$files/build.txt" --target "$work/tools"
  # torch's own NCCL, so that a process holds one; the linker looks for the name without a version.
  nccl='<folder of nvidia.nccl>'
  [[ $dry_run == yes ]] || nccl=$("$python" -c 'import nvidia.nccl; print(nvidia.nccl.__path__[0])')
  run mkdir -p "$work/nccl"
  run ln -s "$nccl/lib/libnccl.so.2" "$work/nccl/libnccl.so"
  # Compute capabilities: 75 is T4, 80 is A100, 89 is L4; CUDA 13 knows none below 75.
  run env PYTHONPATH="$work/tools" PATH="$work/tools/bin:$cuda/bin:/usr/local/bin:/usr/bin:/bin" \
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITHOUT_MPI=1 \
    HOROVOD_WITH_GLOO=1 HOROVOD_GPU=CUDA HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_CUDA_HOME="$cuda" \
    HOROVOD_NCCL_LINK=SHARED HOROVOD_NCCL_INCLUDE="$nccl/include" HOROVOD_NCCL_LIB="$work/nccl" \
    HOROVOD_BUILD_CUDA_CC_LIST=75,80,89 CMAKE_TOOLCHAIN_FILE="$files/toolchain.cmake" \
    "$python" -m pip wheel --no-deps --no-build-isolation --require-hashes --no-cache-dir --quiet \
    --no-binary horovod -r "$files/horovod.txt" --wheel-dir "$work/wheels"
  run "$python" -m pip install --no-deps --no-index --disable-pip-version-check --quiet \
    --find-links "$work/wheels" horovod
}

install "$python" --only-binary :all: -r "$files/$role.txt"
checked=(--requirements "$files/$role.txt")
if [[ $role == gpu ]]; then
  build_horovod
  checked+=(--requirements "$files/horovod.txt")
fi
run "$python" "$files/smoke_test.py" "$role" "${checked[@]}"
