#!/bin/sh
# compile_kernels.sh NVCC OUT - kernels.cu for every GPU that is meant and that this nvcc knows, and
# PTX of the oldest of them, from which drivers make code for GPUs that come later.  setup.py and the
# Makefile call it.
set -e
nvcc=$1
out=$2
here=$(dirname "$0")
known=$("$nvcc" --list-gpu-code)
flags=
for arch in 75 80 86 89 90 100 120; do
  case " $(echo $known) " in
  *" sm_$arch "*)
    [ -n "$flags" ] || flags="-gencode=arch=compute_$arch,code=compute_$arch"
    flags="$flags -gencode=arch=compute_$arch,code=sm_$arch"
    ;;
  esac
done
# Nothing is contracted, so that results have the bits of the CPU backend; see kernels.cu.
exec "$nvcc" -fatbin -O3 -fmad=false -std=c++17 --threads 0 -Xfatbin -compress-all $flags \
  -I "$here" -o "$out" "$here/kernels.cu"
