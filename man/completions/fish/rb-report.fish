# fish completion of rb-report; made by man/make.py
complete -c rb-report -l title -x -d 'What the study is of.'
complete -c rb-report -l require -d 'Status 8 where the study would be worthless; the page is written all the same.'
complete -c rb-report -l clean -x -d '--require: bounds of the standard model'\''s clean accuracy.'
complete -c rb-report -l figures -r -d 'Keep the figures as PNG, SVG and PDF too.'
complete -c rb-report -s o -l output -r -d 'Where to write: .safetensors (one document), .rbs (a stream), .png or a folder/ (pictures); - is standard output.'
complete -c rb-report -s q -l quiet -d 'No progress and no notes on standard error.'
complete -c rb-report -l version -d 'Show the version and exit.'
complete -c rb-report -l help -d 'Show a short help and exit.'
