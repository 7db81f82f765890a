# Prints the paths of the wanted modules and of all that they depend on, each after what it needs.
# usage: awk -f module-order.awk modules.dep MODULE...
BEGIN {
    for (i = 2; i < ARGC; i++) {
        wanted[i] = ARGV[i]
        ARGV[i] = ""
    }
    count = ARGC
}
{
    sub(/:$/, "", $1)
    path_of[module_name($1)] = $1
    for (i = 2; i <= NF; i++)
        needs[$1] = needs[$1] " " $i
}
END {
    for (i = 2; i < count; i++) {
        if (!(module_name(wanted[i]) in path_of)) {
            print "no module " wanted[i] " in " ARGV[1] > "/dev/stderr"
            exit 1
        }
        visit(path_of[module_name(wanted[i])])
    }
}
function module_name(path) {
    sub(/.*\//, "", path)
    sub(/\.ko$/, "", path)
    gsub(/-/, "_", path)
    return path
}
function visit(path,    list, n, j) {
    if (path in seen)
        return
    seen[path] = 1
    n = split(needs[path], list, " ")
    for (j = 1; j <= n; j++)
        visit(list[j])
    print path
}
