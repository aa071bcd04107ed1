#!/bin/sh
# compile_kernels.sh NVCC OUT - kernels.cu for GPUs that this nvcc knows, and PTX of the oldest one
# that is meant, from which drivers make code for all others.  setup.py and the Makefile call it.
# With a third argument, as 90, the PTX for that architecture alone; without OUT the names of all that
# this nvcc knows.
#
# PARASTEP_CUDA_ARCHS says which GPUs: "all" for a release, or numbers as "80 90".  Each takes about
# a second, so that without it they are those of this machine, or two common ones where it has none.
set -e
nvcc=$1
out=$2
only=$3
here=$(dirname "$0")
all="75 80 86 89 90 100 120"
meant=${PARASTEP_CUDA_ARCHS-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
  2> /dev/null | tr -d . | sort -u)}
case $meant in
all) meant=$all ;;
*[!0-9\ ,\;]*) echo "PARASTEP_CUDA_ARCHS: all, or numbers as \"80 90\"; not $meant" >&2; exit 2 ;;
esac
meant=$(echo "${meant:-80 90}" | tr ',;' '  ')
known=" $(echo $("$nvcc" --list-gpu-code)) "
flags=
archs=
for arch in $all; do
  case $known in
  *" sm_$arch "*) archs="$archs $arch" ;;
  esac
done
if [ -z "$out" ]; then
  echo $archs
  exit
fi
oldest=$(echo $archs | cut -d ' ' -f 1)
flags="-gencode=arch=compute_$oldest,code=compute_$oldest"
for arch in $meant; do
  case $known in
  *" sm_$arch "*) flags="$flags -gencode=arch=compute_$arch,code=sm_$arch" ;;
  esac
done
if [ -n "$only" ]; then
  flags="-ptx -arch=compute_$only"
else
  flags="-fatbin --threads 0 -Xfatbin -compress-all $flags"
fi
# Nothing is contracted, so that results have the bits of the CPU backend; see kernels.cu.  There is
# no code for the host in it, so that the host's compiler may be newer than nvcc knows.
exec "$nvcc" -allow-unsupported-compiler -O3 -fmad=false -std=c++17 $flags -I "$here" -o "$out" "$here/kernels.cu"
