#!/bin/sh
# compile_kernels.sh NVCC OUT - kernels.cu for every GPU that is meant and that this nvcc knows, and
# PTX of the oldest of them, from which drivers make code for GPUs that come later.  setup.py and the
# Makefile call it.  With a third argument, as 90, the PTX for that architecture alone; without OUT
# the names of all.
set -e
nvcc=$1
out=$2
only=$3
here=$(dirname "$0")
known=$("$nvcc" --list-gpu-code)
flags=
archs=
for arch in 75 80 86 89 90 100 120; do
  case " $(echo $known) " in
  *" sm_$arch "*)
    archs="$archs $arch"
    [ -n "$flags" ] || flags="-gencode=arch=compute_$arch,code=compute_$arch"
    flags="$flags -gencode=arch=compute_$arch,code=sm_$arch"
    ;;
  esac
done
if [ -z "$out" ]; then
  echo $archs
  exit
fi
if [ -n "$only" ]; then
  flags="-ptx -arch=compute_$only"
else
  flags="-fatbin --threads 0 -Xfatbin -compress-all $flags"
fi
# Nothing is contracted, so that results have the bits of the CPU backend; see kernels.cu.
exec "$nvcc" -O3 -fmad=false -std=c++17 $flags -I "$here" -o "$out" "$here/kernels.cu"
