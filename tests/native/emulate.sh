#!/usr/bin/env bash
# Checks every instruction set against portable C++, those that this processor lacks too: ARM under qemu, AVX-512 and
# AVX-VNNI through SIMDe.   apt install g++-aarch64-linux-gnu qemu-user libsimde-dev
set -euo pipefail
cd "$(dirname "$0")/../.."
SRC=kernels/dqbart_kernels/cpu/src
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
FLAGS=(-O2 -std=c++17 -ffp-contract=off -Wno-psabi -I "$SRC")

check() {  # compiler, table, runner, flags of the instruction set...
  local compiler=$1 table=$2 runner=$3 source
  source=$SRC/isa_$(sed 's/^k//' <<< "$table" | tr '[:upper:]' '[:lower:]').cpp
  "$compiler" "${FLAGS[@]}" "${@:4}" -c "$source" -o "$OUT/isa.o"
  "$compiler" "${FLAGS[@]}" -static -DDQ_CHECK="$table" tests/native/check_kernels.cpp "$SRC/panels.cpp" \
    "$SRC/isa_portable.cpp" "$OUT/isa.o" -o "$OUT/check"
  $runner "$OUT/check"
}

check g++ kAvx2 "" -mavx2 -mfma
check g++ kAvx512 "" -I tests/native/simde
check g++ kAvxVnni "" -I tests/native/simde
check aarch64-linux-gnu-g++ kNeon "qemu-aarch64 -cpu max" -march=armv8.2-a+dotprod
