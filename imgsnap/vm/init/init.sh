#!/bin/sh
# Process 1 of a guest. Mounts the snapshot (EROFS on /dev/vda, or with DAX on /dev/pmem0; through
# dm-verity if there is a program that sets this up) below a writable overlay and then does what the
# host asks for over the control line, the second serial port, one line each way:
#
#   guest: started                    the kernel is up
#   guest: ready                      the root is mounted; it is at "." and at /
#   host:  run TOKEN BASE64           a shell script, run with the console as its terminal
#   guest: exit TOKEN STATUS          how it ended
#   guest: failed REASON              instead of any of these; the guest then stops
#   guest: refused REASON             the same, because the disk is not what its root hash says
#
# On the console NUL "end TOKEN" NUL follows what the script has printed.
#
# Only this process has the control line open: what a command prints is on the console and cannot be
# taken for a status.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

console=/dev/ttyS0
control=/dev/ttyS1
stty -F "$control" raw -echo
exec 3<>"$control"
echo started >&3

stop() { # WORD REASON
    echo "$1 $2" >&3
    stty -F "$control" raw -echo # returns when all has been sent
    reboot -f
}

failed() {
    stop failed "$1"
}

refuse_corrupted() { # what the kernel has found so far; an error of the disk itself is none
    case $(dmesg) in
        *verity*" is corrupted"*) stop refused "the snapshot is not what its root hash says" ;;
    esac
}

unreadable() { # REASON
    refuse_corrupted
    failed "$1"
}

# Words of the kernel's command line that begin with imgsnap. are for us.
disk=/dev/vda options=ro scratch= address= gateway=
for word in $(cat /proc/cmdline); do
    case $word in
        imgsnap.dax=*) disk=${word#*=} options=ro,dax=always ;;
        imgsnap.scratch=*) scratch=${word#*=} ;;
        imgsnap.address=*) address=${word#*=} ;;
        imgsnap.gateway=*) gateway=${word#*=} ;;
    esac
done

for module in /modules/*.ko; do
    [ -e "$module" ] || continue
    said=$(insmod "$module" 2>&1) && continue
    case $module in
        *-sha256_ssse3.ko) ;; # only faster, and not for every processor
        *) failed "the kernel does not load ${module#/modules/}: $said" ;;
    esac
done
rm -rf /modules

wait_for() { # DEVICE: discovery goes on after the module is loaded
    n=0
    while [ ! -e "$1" ]; do
        [ $n -lt 200 ] || failed "there is no $1"
        n=$((n + 1))
        sleep 0.05
    done
}

ip link set lo up
if [ -n "$address" ]; then
    said=$(ip addr add "$address" dev eth0 2>&1 && ip link set eth0 up 2>&1 &&
        ip route add default via "$gateway" 2>&1) || failed "the network: $said"
fi

wait_for "$disk"
if [ -e /verity ]; then
    said=$(/verity 2>&1) || failed "dm-verity: $said"
    disk=/dev/dm-0
    wait_for $disk
fi
mkdir -p /mnt/image /mnt/upper
said=$(mount -t erofs -o "$options" "$disk" /mnt/image 2>&1) ||
    unreadable "mounting the snapshot: $said"
# A kernel that cannot map files mounts it all the same, without.
[ "$options" = ro ] || grep -q ' /mnt/image erofs .*dax=always' /proc/mounts ||
    failed "the guest kernel does not map the snapshot's files: it lacks CONFIG_FS_DAX"
if [ -n "$scratch" ]; then
    wait_for "$scratch"
    said=$(mount -t ext4 "$scratch" /mnt/upper 2>&1) || failed "mounting the scratch disk: $said"
else
    mount -t tmpfs -o mode=755 tmpfs /mnt/upper
fi
mkdir -p /mnt/upper/upper /mnt/upper/work
# The overlay's root directory is as its upper one: give that the image's owner and mode.
chown "$(stat -c %u:%g /mnt/image)" /mnt/upper/upper
chmod "$(stat -c %a /mnt/image)" /mnt/upper/upper
said=$(mount -t overlay \
    -o lowerdir=/mnt/image,upperdir=/mnt/upper/upper,workdir=/mnt/upper/work root /new 2>&1) ||
    failed "mounting the overlay: $said"

cd /new || unreadable "there is no root"
ls >/dev/null # so that a root directory that cannot be read is found now; ls says nothing
mkdir -p dev proc sys
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t devtmpfs devtmpfs dev
mkdir -p dev/pts dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev shm dev/shm
for pair in fd=/proc/self/fd stdin=/proc/self/fd/0 stdout=/proc/self/fd/1 stderr=/proc/self/fd/2; do
    [ -e "dev/${pair%%=*}" ] || ln -s "${pair#*=}" "dev/${pair%%=*}"
done
# The image's root on top of ours: commands see it as / in their mount table. This process still has
# its own files below the first root.
mount -o move . /
echo imgsnap >/proc/sys/kernel/hostname
stty -F "$console" raw -echo

[ -e /verity ] && refuse_corrupted
echo ready >&3
while read -r word token script <&3; do
    [ "$word" = run ] || failed "the host asked for $word"
    script=$(echo "$script" | base64 -d)
    # The end of a session hangs its terminal up, which throws away what is still to be sent: the
    # leader only ends when all is. Its own traps are not its child's.
    setsid -c sh -c 'trap : INT QUIT; sh -c "$1"; status=$?; stty raw -echo; exit $status' \
        run "$script" <"$console" >"$console" 2>&1 3>&-
    status=$?
    stty -F "$console" raw -echo
    # The two lines do not wait for each other: this says that the command's output has ended.
    printf '\000end %s\000' "$token" >"$console"
    echo "exit $token $status" >&3
done
failed "the host closed the control line"
