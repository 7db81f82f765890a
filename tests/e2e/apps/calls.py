"""Has the monitor make every system call that it makes for a shared folder, which is the argument."""

import os
import sys

folder = sys.argv[1]
path = os.path.join(folder, "file")
other = os.path.join(folder, "other")

file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
os.pwrite(file, b"x" * 100_000, 0)
assert os.preadv(file, [bytearray(10), bytearray(10)], 5) == 20
os.fsync(file)
os.fdatasync(file)
os.posix_fallocate(file, 0, 200_000)
os.ftruncate(file, 150_000)
os.ftruncate(file, 1 << 20)
assert os.lseek(file, 0, os.SEEK_HOLE) > 0
os.lseek(file, 300_000, os.SEEK_SET)
copy = os.open(other, os.O_RDWR | os.O_CREAT, 0o644)
assert os.copy_file_range(file, copy, 50_000, 0, 0) > 0
os.fchmod(copy, 0o4755)
os.write(copy, b"y")
os.close(os.dup(copy))
os.utime(file)
os.setxattr(file, "user.a", b"1")
assert os.getxattr(file, "user.a") == b"1"
assert "user.a" in os.listxattr(file)
os.removexattr(file, "user.a")
os.close(copy)
os.close(file)

os.link(path, path + "2")
os.rename(path + "2", path + "3")
os.symlink("nowhere", path + "4")
assert os.readlink(path + "4") == "nowhere"
os.utime(path + "4", follow_symlinks=False)
os.mkdir(path + "5")
os.mkfifo(path + "6")
os.chmod(path + "6", 0o600)
os.truncate(path, 7)
# What is no file is reached by its name.
for special in ["4", "6"]:
    for act in [os.listxattr, lambda it, **how: os.getxattr(it, "security.x", **how)]:
        try:
            act(path + special, follow_symlinks=False)
        except OSError:
            pass
    for act in [
        lambda it: os.setxattr(it, "security.x", b"1", follow_symlinks=False),
        lambda it: os.removexattr(it, "security.x", follow_symlinks=False),
    ]:
        try:
            act(path + special)
        except OSError:
            pass
os.listdir(folder)
os.statvfs(folder)
os.sync()
for name in ["3", "4", "6", ""]:
    os.unlink(path + name)
os.rmdir(path + "5")
os.unlink(other)
print("all of them")
