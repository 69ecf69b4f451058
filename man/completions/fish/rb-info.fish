# fish completion of rb-info; made by man/make.py
complete -c rb-info -l check -d 'Say nothing if all is well; status 8 if not.'
complete -c rb-info -l join -d 'Join shards into one document; the missing ones are named.'
complete -c rb-info -l replay -d 'Print the shell lines that remake the file.'
complete -c rb-info -l json -d 'JSON lines, also on a terminal.'
complete -c rb-info -s o -l output -r -d 'Where to write: .safetensors (one document), .rbs (a stream), .png or a folder/ (pictures); - is standard output.'
complete -c rb-info -l max-document -x -d 'Refuse documents larger than this.'
complete -c rb-info -l version -d 'Show the version and exit.'
complete -c rb-info -l help -d 'Show a short help and exit.'
