#!/usr/bin/env bash
# usage: ./setup.sh [--dev] [--accelerator NAME] [--python PATH] [--venv DIR] [--latest] [--dry_run]
#
# Makes or updates the virtual environment, with uv if it is on the PATH, else with pip. --dev,
# --accelerator and --python keep the values of the last run.
#   --dev               add the tools for tests, lint and notebooks
#   --accelerator NAME  cpu, cuda12, tpu, or auto (default): by nvidia-smi and the PCI devices
#   --python PATH       default: $PYTHON, or the first of 3.13, 3.12, 3.11, python3 that starts
#   --venv DIR          default: .venv beside this script
#   --latest            newest releases instead of the tested ones in requirements/constraints.txt
#   --dry_run           print the commands and stop
set -euo pipefail
unset PYTHONHOME PYTHONPATH CDPATH # the first two would let packages from outside in
export UV_PYTHON_DOWNLOADS=never PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
die() { echo "error: $1" >&2 && exit "${2:-1}"; }
starts() { # prints its real path; a pyenv shim may exist and fail, free-threaded builds lack wheels
  "$1" -Ic 'import sys; assert sys.version_info >= (3, 11) and "t" not in sys.abiflags
print(sys._base_executable)' 2>/dev/null | grep ^/
}
find_python() {
  for name in python3.13 python3.12 python3.11 python3; do
    for path in $(type -aP $name) "${PYENV_ROOT:-${HOME-}/.pyenv}"/versions/*/bin/$name; do
      starts "$path" && return
    done
  done
}
find_accelerator() { # TPUs by the PCI numbers that jax looks for (jax/_src/hardware_utils.py)
  local tpu='^PCI_ID=1AE0:00(27|56|5E|6[23F]|76|7C|83)$'
  if nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then echo cuda12; return; fi
  if grep -qsE "$tpu" /sys/bus/pci/devices/*/uevent; then echo tpu; else echo cpu; fi
}
run() { # prints a command and runs it, with its output in the log
  echo "setup: $* >>$log" >&2
  [ $dry_run = yes ] || "$@" >>"$log" 2>&1 ||
    die "$1 failed: $(grep -iE '^error|×' "$log" | tail -n 1); try again, or read $log"
}
venv="" python=${PYTHON:-} accelerator="" dev="" latest=no dry_run=no
while [ $# -gt 0 ]; do
  case $1=${2:-} in
    --dev=* | --latest=*) declare "${1#--}=yes" ;;
    --dry_run=* | --dry-run=*) dry_run=yes ;;
    -h=* | --help=*) sed -n '2,/^#   --dry/s/^# \{0,1\}//p' "$0" && exit ;;
    --accelerator=?* | --python=?* | --venv=?*) declare "${1#--}=$2" && shift ;;
    *) die "setup.sh: got '$1${2:+ $2}'; expected an option and its value; try --help" 2 ;;
  esac
  shift
done
[[ $venv = /* || -z $venv ]] || venv=$PWD/$venv
cd "$(dirname "$0")"
venv=${venv:-$PWD/.venv} && log=$venv/setup.log state=$venv/.setup

# The last run: its options, and the hash of the requirements that it installed (- if it failed).
read -r last_accelerator last_dev last_hash last_python <<<"$(cat "$state" 2>/dev/null)"
[ -f "$state" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ] ||
  die "--venv: got '$venv', not made by setup.sh; expected a new directory; try another" 2
accelerator=${accelerator:-${last_accelerator:-auto}} dev=${dev:-${last_dev:-no}}
[ "$accelerator" != auto ] || accelerator=$(find_accelerator)
[[ $accelerator =~ ^(cpu|cuda12|tpu)$ ]] ||
  die "--accelerator: got '$accelerator'; expected auto, cpu, cuda12 or tpu; try --help" 2
python=${python:-${last_python:-$(find_python || true)}} hash=$latest$(cat requirements/*.txt | cksum | tr ' ' -)
[ -n "$python" ] || die "--python: got none; expected 3.11 or newer; try 'sudo apt install python3-venv'"
path=$(cd "$OLDPWD" && starts "$python") || die "--python: got '$python'; expected 3.11 or newer; try another" 2

make=("$path" -m venv "$venv") install=("$venv/bin/python" -m pip install)
if uv --version >/dev/null 2>&1; then
  make=(uv venv --seed --allow-existing --python "$path" "$venv")
  install=(uv pip install --python "$venv/bin/python")
fi
install+=(-r "requirements/$accelerator.txt")
[ "$dev" = no ] || install+=(-r requirements/dev.txt)
[ "$latest" = yes ] || install+=(-c requirements/constraints.txt)
if [ "${last_hash:--}" = - ] || [ "$accelerator $path" != "$last_accelerator $last_python" ]; then
  [ "${make[0]}" = uv ] || "$path" -c 'import ensurepip' 2>/dev/null ||
    die "$path has no ensurepip; try 'sudo apt install python3-venv'"
  [ $dry_run = yes ] || { rm -rf "$venv" && mkdir -p "$venv" && echo "$accelerator $dev - $path" >"$state"; }
  run "${make[@]}" && last_hash=-
fi
[ "$last_dev $last_hash" = "$dev $hash" ] || run "${install[@]}"
[ $dry_run = no ] || exit 0
echo "$accelerator $dev $hash $path" >"$state" && echo "setup: $venv is ready" >&2
