#!/usr/bin/env bash
# Copies the headers that csrc includes, and torch's licence, out of an unpacked wheel of torch.
#   csrc/torch/copy_headers.sh FOLDER      FOLDER holds torch/ and torch-*.dist-info/
set -euo pipefail
wheel="$(cd "$1" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")"
rm -rf include LICENSE
target=$(sed -n 's/^TARGET = "\(.*\)".*/\1/p' ../../setup.py)
cuda="${CUDA_HOME:-/usr/local/cuda}/include"
for source in ../../csrc/cpu/*.cpp ../../csrc/cuda/*.cu; do
    flags=("-std=c++17" "$target" "-I$wheel/torch/include")
    [[ $source == *.cu ]] && flags+=(-DUSE_CUDA "-I$cuda")
    "${CXX:-g++}" "${flags[@]}" -x c++ -M "$source"
done | tr ' \\' '\n\n' | grep "^$wheel/torch/include/" | sort -u | while read -r header; do
    copy="include/${header#"$wheel/torch/include/"}"
    mkdir -p "$(dirname "$copy")"
    cp "$header" "$copy"
    chmod 644 "$copy"
done
# A wheel's file goes on with the licences of what the wheel bundles; none of that is copied.
cat "$wheel"/torch-*.dist-info/{licenses/,}LICENSE 2>/dev/null | sed '/^The PyTorch repository and source/,$d' >LICENSE || true
