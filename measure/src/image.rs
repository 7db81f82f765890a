//! An image of a stated size, as `docker save` would write it: one layer with one file that nothing can compress.

use crate::tar::{END, RECORD, header};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};

/// Its name in the engine.
pub const NAME: &str = "lighter-bench:api";

/// The file's content is made of such blocks, bytes, alike but for their numbers.
const BLOCK: usize = 64 << 10;

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Size of the layer's file, MiB.
    pub mib: u32,
    /// SHA-256 of the layer in hexadecimal, which the engine checks.
    pub layer_sha256: String,
}

impl Image {
    /// Of a layer with a file of `mib` MiB. `digest` gets what writes the layer, and returns its SHA-256 in hexadecimal.
    ///
    /// # Errors
    /// From `digest`.
    pub fn new(
        mib: u32,
        digest: impl FnOnce(&dyn Fn(&mut dyn Write) -> io::Result<()>) -> io::Result<String>,
    ) -> io::Result<Self> {
        let layer_sha256 = digest(&|out| write_layer(mib, out))?;
        Ok(Self { mib, layer_sha256 })
    }

    /// The length of what [`Image::write`] writes, bytes.
    pub fn length(&self) -> u64 {
        let metadata = self.metadata();
        let files = metadata.iter().map(|(_, text)| text.len() as u64);
        let files = files.chain([layer_length(self.mib)]);
        files
            .map(|length| RECORD as u64 + length.next_multiple_of(RECORD as u64))
            .sum::<u64>()
            + END.len() as u64
    }

    /// Writes the archive.
    ///
    /// # Errors
    /// From `out`.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        for (name, text) in self.metadata() {
            out.write_all(&header(name, "644", text.len() as u64))?;
            out.write_all(text.as_bytes())?;
            let padding = text.len().next_multiple_of(RECORD) - text.len();
            out.write_all(&END[..padding])?;
        }
        out.write_all(&header("layer.tar", "644", layer_length(self.mib)))?;
        write_layer(self.mib, out)?;
        out.write_all(&END)
    }

    fn metadata(&self) -> [(&'static str, String); 2] {
        let manifest =
            format!(r#"[{{"Config":"config.json","RepoTags":["{NAME}"],"Layers":["layer.tar"]}}]"#);
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":["sha256:{}"]}}}}"#,
            self.layer_sha256
        );
        [("manifest.json", manifest), ("config.json", config)]
    }
}

fn file_length(mib: u32) -> u64 {
    u64::from(mib) << 20
}

fn layer_length(mib: u32) -> u64 {
    (RECORD + END.len()) as u64 + file_length(mib)
}

fn write_layer(mib: u32, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&header("data", "644", file_length(mib)))?;
    let mut block = random_block();
    for number in 0..file_length(mib) / BLOCK as u64 {
        block[..8].copy_from_slice(&number.to_le_bytes());
        out.write_all(&block)?;
    }
    out.write_all(&END)
}

fn random_block() -> Vec<u8> {
    // Marsaglia's xorshift.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(BLOCK / 8).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn image(mib: u32) -> Image {
        Image::new(mib, |_| Ok("cafe".into())).unwrap()
    }

    /// What `tar` says of `archive`.
    fn tar(arguments: &[&str], archive: &[u8]) -> Vec<u8> {
        let mut child = Command::new("tar")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let archive = archive.to_vec();
        let feed = std::thread::spawn(move || stdin.write_all(&archive));
        let output = child.wait_with_output().unwrap();
        feed.join().unwrap().unwrap();
        assert!(output.status.success());
        output.stdout
    }

    #[test]
    fn tar_unpacks_the_archive_and_its_layer() {
        let image = image(2);
        let mut archive = vec![];
        image.write(&mut archive).unwrap();
        assert_eq!(archive.len() as u64, image.length());
        let names = String::from_utf8(tar(&["-tf", "-"], &archive)).unwrap();
        assert_eq!(names, "manifest.json\nconfig.json\nlayer.tar\n");
        let config = String::from_utf8(tar(&["-xOf", "-", "config.json"], &archive)).unwrap();
        assert!(config.contains("sha256:cafe"), "{config}");
        let layer = tar(&["-xOf", "-", "layer.tar"], &archive);
        let mut digested = vec![];
        Image::new(2, |layer| {
            layer(&mut digested)?;
            Ok(String::new())
        })
        .unwrap();
        assert!(layer == digested, "the digest is not of what is in the archive");
        let data = tar(&["-xOf", "-", "data"], &layer);
        assert_eq!(data.len(), 2 << 20);
        // No two blocks are alike, and no byte is much more frequent than the others.
        assert!(data[..BLOCK] != data[BLOCK..2 * BLOCK]);
        let zeroes = data.iter().filter(|&&byte| byte == 0).count();
        assert!((1 << 12..1 << 14).contains(&zeroes), "{zeroes}");
    }
}
