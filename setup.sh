#!/usr/bin/env bash
# usage: ./setup.sh [options], to make the virtual environment, or to update it when something
# changed, with uv if it is on the PATH, else with pip. An option left out keeps its last value.
#   --dev               add the tools for tests, lint and notebooks
#   --accelerator NAME  cpu, cuda12, tpu, or auto (default: by what nvidia-smi and the PCI bus list)
#   --python PATH       default: $PYTHON, or the newest of 3.11 to 3.13 on PATH, in pyenv or uv
#   --venv DIR          default: .venv beside this script
#   --latest            newest releases instead of the tested ones in requirements/constraints.txt
#   --dry_run           print the commands and stop; also --dry-run
set -euo pipefail && shopt -s extglob
unset PYTHONHOME PYTHONPATH CDPATH # the first two would let packages from outside in
export UV_PYTHON_DOWNLOADS=never PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
die() { printf 'error: %s\n' "$1" >&2 && exit "${2:-1}"; }
# Prints a rank and the real path of an interpreter that starts and that the libraries have wheels
# for. Those with ensurepip rank highest, among them those tested, among them the newest.
probe() {
  "$1" -I -c 'import importlib.util as u, ssl, sys; v = sys.version_info
assert v >= (3, 11) and sys.implementation.name == "cpython" and "t" not in sys.abiflags
rank = 1 + 2 * bool(u.find_spec("ensurepip")) + (v < (3, 14))
print(rank * 10**9 + v[0] * 10**6 + v[1] * 10**3 + v[2], sys._base_executable or sys.executable)
' 2>/dev/null </dev/null | grep -E '^[0-9]{10} /'
}
find_python() { # all of the PATH, since a pyenv shim may fail and hide an interpreter that starts
  IFS=$'\n'
  for path in $(type -aP python3.{14,13,12,11} python3) ~/.local/share/uv/python/*/bin/python3 \
    "${PYENV_ROOT:-${HOME-}/.pyenv}"/versions/*/bin/python3; do probe "$path" || true; done |
    sort -n | tail -n 1
}
find_accelerator() { # TPUs by the PCI numbers that jax looks for (jax/_src/hardware_utils.py)
  if nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then echo cuda12; else
    grep -qsE '^PCI_ID=1AE0:00(27|56|5E|6[23F]|76|7C|83)$' /sys/bus/pci/devices/*/uevent &&
      echo tpu || echo cpu; fi
}
run() { # prints the command and, unless this is a dry run, runs it with its output in the log
  echo "setup: $* >>$log" >&2
  [ $dry_run = yes ] || "$@" >>"$log" 2>&1 ||
    die "$1 failed: $(grep -iE '^error|×' "$log" | tail -n 1); try again, or read $log"
}
mark() { mkdir -p "$venv" && echo "$accelerator $dev $latest $1 $venv" >"$stamp"; }

cd "$(dirname "$0")"
venv=$PWD/.venv python=${PYTHON:-} accelerator="" dev="" latest="" dry_run=no
while [ $# -gt 0 ]; do
  case $1=${2:-} in
    --dev=* | --latest=*) declare "${1#--}=yes" ;;
    --dry[-_]run=*) dry_run=yes ;;
    -h=* | --help=*) sed -n '2,/^set/s/^# //p' setup.sh && exit ;;
    --python=?* | --venv=?* | --accelerator=@(auto|cpu|cuda12|tpu)) declare "${1#--}=$2" && shift ;;
    *) die "setup.sh: got '$1${2:+ $2}'; expected an option and its value; try --help" 2 ;;
  esac
  shift
done
[[ $venv = /* ]] || venv=$OLDPWD/$venv
bin=$venv/bin/python log=$venv/setup.log stamp=$venv/.setup
[ -e "$stamp" ] || [ -e "$stamp-done" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ] ||
  die "--venv: got '$venv', which setup.sh did not make; expected a new directory; try another" 2
# In the stamp: the options, a hash of the requirements (- until they are installed), the directory.
read -r old_accelerator old_dev old_latest old_hash old_venv <<<"$(cat "$stamp" 2>/dev/null)"
read -r old_rank _ <<<"$(probe "$bin")"
read -r rank path <<<"$(cd "$OLDPWD" && probe "${python:-$bin}" || [ "$python" ] || find_python)"
[ -n "$path" ] || die "--python: got ${python:-none on the PATH, in pyenv or uv}; expected 3.11 or\
 newer that starts; try 'sudo apt install python3 python3-venv', or another PATH" "${python:+2}"
accelerator=${accelerator:-${old_accelerator:-auto}} dev=${dev:-${old_dev:-no}}
latest=${latest:-${old_latest:-no}} hash=$(cat requirements/*.txt | cksum | tr ' ' -)
[ "$accelerator" != auto ] || accelerator=$(find_accelerator)
make=("$path" -m venv) install=("$bin" -m pip install)
! uv --version >/dev/null 2>&1 ||
  { make=(uv venv --seed --allow-existing -p "$path") install=(uv pip install -p "$bin"); }
install+=(-r "requirements/$accelerator.txt")
[ "$dev" = no ] || install+=(-r requirements/dev.txt)
[ "$latest" = yes ] || install+=(-c requirements/constraints.txt)
wanted="$accelerator $latest $venv $rank"
if [ "$old_hash" = - ] || [ "$old_accelerator $old_latest $old_venv $old_rank" != "$wanted" ]; then
  [ "${make[0]}" = uv ] || [[ $rank = [34]* ]] ||
    die "$path has no ensurepip; try 'sudo apt install python3.$((rank / 1000 % 1000))-venv'"
  [ $dry_run = yes ] || { mark - && rm -rf "${venv:?}"/*; } # marked first, in case it is killed
  run "${make[@]}" "$venv" && old_hash=-
fi
[ "$old_dev $old_hash" = "$dev $hash" ] || run "${install[@]}"
[ $dry_run = yes ] || { mark "$hash" && echo "setup: $venv is ready" >&2; }
