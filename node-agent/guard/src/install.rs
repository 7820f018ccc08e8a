//! Puts the plugin into the host's CNI chain, and takes it out again.
//!
//! Every pod of the node depends on that chain, so the order matters: the program is there before the
//! configuration names it, and goes after it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::conflist::{self, ConflistError, Entry};
use crate::{PROGRAM, file};

/// What a container runtime takes for configurations.
const ENDINGS: [&str; 3] = ["conf", "conflist", "json"];

/// Ending of a configuration of one plugin while a list stands in its place.
const SET_ASIDE: &str = "ambit-before";

/// Mode of the program.
const EXECUTABLE: u32 = 0o755;

/// The places of the host that a container runtime reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Folder of programs (`bin_dir`, usually /opt/cni/bin).
    pub programs: PathBuf,
    /// Folder of configurations (`conf_dir`, usually /etc/cni/net.d).
    pub configurations: PathBuf,
}

/// Why the plugin is not in the chain, or still is.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// There is nothing to add it to.
    #[error(
        "{} holds no CNI configuration: mount the folder that the container runtime reads (conf_dir) \
         and name it by CNI_CONF_DIR", .0.display()
    )]
    NoConfiguration(PathBuf),
    /// The runtime takes its programs from elsewhere: it would not find the plugin either.
    #[error(
        "{} has no program {program:?}, which {} names: mount the folder that the container runtime \
         takes them from (bin_dir) and name it by CNI_BIN_DIR", .folder.display(), .configuration.display()
    )]
    OtherPrograms {
        /// What is missing.
        program: String,
        /// Where.
        folder: PathBuf,
        /// Who names it.
        configuration: PathBuf,
    },
    /// The configuration is of no use.
    #[error("add {PROGRAM} to {}", .0.display())]
    Conflist(PathBuf, #[source] ConflistError),
    /// A file cannot be read.
    #[error("read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// A file cannot be written or removed.
    #[error("write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
}

impl Place {
    /// Puts the plugin at the end of the configuration that the runtime uses, with `program` as its
    /// program; whether anything had to be done. Nothing is touched that is as it should be.
    ///
    /// # Errors
    /// If the runtime would not find it, or a file cannot be written; then the chain is as it was.
    pub fn install(&self, program: &Path, entry: &Entry) -> Result<bool, InstallError> {
        let path = self.first()?;
        let text = read(&path)?;
        let in_chain = |error| InstallError::Conflist(path.clone(), error);
        let is_list = path.extension() == Some(OsStr::new("conflist"));
        let list = if is_list {
            text.clone()
        } else {
            conflist::of_single(&text).map_err(in_chain)?
        };
        let wanted = conflist::with(&list, entry).map_err(in_chain)?;
        self.has_programs_of(&path, &list)?;
        let copied = self.copy(program)?;
        if is_list && wanted == text {
            return Ok(copied);
        }
        write(&path.with_extension("conflist"), &wanted, mode(&path)?)?;
        if !is_list {
            rename(&path, &set_aside(&path))?;
        }
        Ok(true)
    }

    /// Takes the plugin out of every configuration, then removes its program.
    ///
    /// # Errors
    /// If a file cannot be written or removed.
    pub fn uninstall(&self) -> Result<(), InstallError> {
        for path in self.files()? {
            if path.extension() == Some(OsStr::new("conflist")) {
                take_out(&path)?;
            }
        }
        let program = self.programs.join(PROGRAM);
        file::remove(&program).map_err(|error| InstallError::Write(program, error))
    }

    /// The configuration that the runtime uses: the first by name.
    fn first(&self) -> Result<PathBuf, InstallError> {
        let first = self.files()?.into_iter().next();
        first.ok_or_else(|| InstallError::NoConfiguration(self.configurations.clone()))
    }

    /// The configurations, by name.
    fn files(&self) -> Result<Vec<PathBuf>, InstallError> {
        let failed = |error| InstallError::Read(self.configurations.clone(), error);
        let entries = match fs::read_dir(&self.configurations) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let ending = path.extension().unwrap_or_default();
            if ENDINGS.iter().any(|known| ending == *known) {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }

    /// A folder without the programs of the others is not the one that the runtime looks into, and a
    /// chain with a plugin that it does not find would keep every pod from starting. Links may lead to
    /// where only the host can follow.
    fn has_programs_of(&self, configuration: &Path, list: &str) -> Result<(), InstallError> {
        let kinds = conflist::kinds(list)
            .map_err(|error| InstallError::Conflist(configuration.to_owned(), error))?;
        for program in kinds.into_iter().filter(|kind| kind != PROGRAM) {
            if self.programs.join(&program).symlink_metadata().is_err() {
                return Err(InstallError::OtherPrograms {
                    program,
                    folder: self.programs.clone(),
                    configuration: configuration.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Whether the program was not there, or another.
    fn copy(&self, program: &Path) -> Result<bool, InstallError> {
        let target = self.programs.join(PROGRAM);
        let wanted =
            fs::read(program).map_err(|error| InstallError::Read(program.to_owned(), error))?;
        let there =
            file::read(&target).map_err(|error| InstallError::Read(target.clone(), error))?;
        if there.as_ref() == Some(&wanted) && mode(&target)? == EXECUTABLE {
            return Ok(false);
        }
        file::replace(&target, &wanted, EXECUTABLE)
            .map_err(|error| InstallError::Write(target, error))?;
        Ok(true)
    }
}

/// Takes the plugin out of one configuration; puts back what the list stands in the place of.
fn take_out(list: &Path) -> Result<(), InstallError> {
    for ending in ENDINGS {
        let single = list.with_extension(ending);
        if set_aside(&single).exists() {
            rename(&set_aside(&single), &single)?;
            return file::remove(list).map_err(|error| InstallError::Write(list.to_owned(), error));
        }
    }
    let text = read(list)?;
    // What cannot be read does not name it.
    match conflist::without(&text) {
        Ok(without) if without != text => write(list, &without, mode(list)?),
        _ => Ok(()),
    }
}

fn set_aside(single: &Path) -> PathBuf {
    let mut name = single.as_os_str().to_owned();
    name.push(format!(".{SET_ASIDE}"));
    name.into()
}

fn read(path: &Path) -> Result<String, InstallError> {
    fs::read_to_string(path).map_err(|error| InstallError::Read(path.to_owned(), error))
}

fn mode(path: &Path) -> Result<u32, InstallError> {
    let metadata =
        fs::metadata(path).map_err(|error| InstallError::Read(path.to_owned(), error))?;
    Ok(metadata.permissions().mode() & 0o7777)
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), InstallError> {
    file::replace(path, text.as_bytes(), mode)
        .map_err(|error| InstallError::Write(path.to_owned(), error))
}

fn rename(from: &Path, to: &Path) -> Result<(), InstallError> {
    fs::rename(from, to).map_err(|error| InstallError::Write(to.to_owned(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str =
        "{\"cniVersion\": \"1.0.0\", \"name\": \"x\",\n \"plugins\": [{\"type\": \"ptp\"}] }";
    const SINGLE: &str = "{\"cniVersion\": \"0.3.1\", \"name\": \"x\", \"type\": \"ptp\"}\n";

    struct Host {
        folder: tempfile::TempDir,
        place: Place,
    }

    impl Host {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let place = Place {
                programs: folder.path().join("bin"),
                configurations: folder.path().join("net.d"),
            };
            fs::create_dir(&place.programs).unwrap();
            fs::create_dir(&place.configurations).unwrap();
            fs::write(folder.path().join("own"), "program").unwrap();
            let host = Self { folder, place };
            // A link that leads nowhere from here.
            std::os::unix::fs::symlink("/nowhere/ptp", host.place.programs.join("ptp")).unwrap();
            host
        }

        fn configure(&self, name: &str, text: &str) {
            fs::write(self.place.configurations.join(name), text).unwrap();
        }

        fn install(&self) -> Result<bool, InstallError> {
            let entry = Entry {
                orders: "/orders".to_owned(),
                unheld: Vec::new(),
            };
            self.place.install(&self.folder.path().join("own"), &entry)
        }

        /// Every file of both folders but the link, with what it holds.
        fn files(&self) -> Vec<(String, String)> {
            let mut all = Vec::new();
            for folder in [&self.place.programs, &self.place.configurations] {
                for entry in fs::read_dir(folder).unwrap() {
                    let path = entry.unwrap().path();
                    if let Ok(text) = fs::read_to_string(&path) {
                        let name = path.file_name().unwrap().to_string_lossy().into_owned();
                        all.push((name, text));
                    }
                }
            }
            all.sort();
            all
        }

        fn kinds(&self, name: &str) -> Vec<String> {
            conflist::kinds(&read(&self.place.configurations.join(name)).unwrap()).unwrap()
        }
    }

    #[test]
    fn it_joins_the_first_list_once_and_leaves_it_as_it_was() {
        let host = Host::new();
        host.configure("10-x.conflist", LIST);
        host.configure("20-y.conflist", LIST);
        host.configure("README", "no configuration");
        let before = host.files();
        assert!(host.install().unwrap());
        assert!(!host.install().unwrap());
        assert_eq!(host.kinds("10-x.conflist"), ["ptp", "ambit-cni"]);
        assert_eq!(host.kinds("20-y.conflist"), ["ptp"]);
        let program = host.place.programs.join(PROGRAM);
        assert_eq!(mode(&program).unwrap(), 0o755);
        // Somebody writes the list anew; somebody brings another one.
        host.configure("10-x.conflist", LIST);
        assert!(host.install().unwrap());
        host.configure("05-z.conflist", LIST);
        assert!(host.install().unwrap());
        assert_eq!(host.kinds("05-z.conflist"), ["ptp", "ambit-cni"]);
        host.place.uninstall().unwrap();
        host.place.uninstall().unwrap();
        fs::remove_file(host.place.configurations.join("05-z.conflist")).unwrap();
        assert_eq!(host.files(), before);
    }

    #[test]
    fn a_configuration_of_one_plugin_is_set_aside_and_comes_back() {
        let host = Host::new();
        host.configure("10-x.conf", SINGLE);
        let before = host.files();
        for _ in 0..2 {
            assert!(host.install().unwrap());
            assert!(!host.install().unwrap());
            assert_eq!(host.kinds("10-x.conflist"), ["ptp", "ambit-cni"]);
            assert!(!host.place.configurations.join("10-x.conf").exists());
            // Its CNI writes it anew.
            host.configure("10-x.conf", SINGLE);
        }
        assert!(host.install().unwrap());
        host.place.uninstall().unwrap();
        assert_eq!(host.files(), before);
    }

    #[test]
    fn where_the_runtime_would_not_find_it_nothing_is_touched() {
        let host = Host::new();
        assert!(matches!(
            host.install(),
            Err(InstallError::NoConfiguration(_))
        ));
        for (text, names) in [
            (LIST.replace("ptp", "calico"), "calico"),
            ("{".to_owned(), "no CNI configuration"),
            ("{\"plugins\": []}".to_owned(), "no plugins"),
        ] {
            host.configure("10-x.conflist", &text);
            let before = host.files();
            let error = host.install().unwrap_err();
            let told = format!(
                "{error} {:?}",
                std::error::Error::source(&error).map(ToString::to_string)
            );
            assert!(told.contains(names), "{told}");
            assert_eq!(host.files(), before);
        }
    }
}
