# fish completion of rb-view; made by man/make.py
complete -c rb-view -l rows -x -d 'The most rows of a contact sheet.'
complete -c rb-view -l spread -d 'Rows of a contact sheet at even distances, instead of the first.'
complete -c rb-view -l metric -x -d 'Records: bars of this metric instead of accuracy curves; models: accuracy (default) or loss.'
complete -c rb-view -s o -l output -r -d 'Where to write: .safetensors (one document), .rbs (a stream), .png or a folder/ (pictures); - is standard output.'
complete -c rb-view -l max-document -x -d 'Refuse documents larger than this.'
complete -c rb-view -s q -l quiet -d 'No progress and no notes on standard error.'
complete -c rb-view -l version -d 'Show the version and exit.'
complete -c rb-view -l help -d 'Show a short help and exit.'
